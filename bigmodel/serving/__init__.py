"""An HTTP server with OpenAI's shapes: `bigmodel serve`."""
