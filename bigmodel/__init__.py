"""bigmodel: distributed pretraining of language models, from dataset shards to checkpoints."""

__version__ = "0.3.0.dev0"
