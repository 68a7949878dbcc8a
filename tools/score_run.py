"""The validation loss of a finished run under other settings of its data: `python -m tools.score_run RUN ...`.

    python -m tools.score_run runs/masked --set data.masked_decoder_share=0 --output loss.json

A run trained on masked, dropped or noisy inputs validates on such inputs, too. This scores its newest checkpoint with
other inputs, so that runs compare. In: a run directory, settings of [data]. Out: a line, and the JSON object that
`bigmodel evaluate --output` writes. Costs: one evaluation of the whole validation split.
"""

import sys
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from bigmodel.config.settings import Settings, UserError, settings_from_table, to_toml_table
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation import evaluation_text
from bigmodel.evaluation.classify import make_validation
from bigmodel.run_directory import EXIT_USER, write_json
from bigmodel.training.load_model import load_trained


def score(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run directory with a checkpoint")],
    override: Annotated[list[str], typer.Option("--set", metavar="data.KEY=VALUE", help="repeatable")] = [],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="also write all numbers to this JSON file")] = None,
) -> None:
    """Score a run's newest checkpoint on validation data read with other settings."""
    trained = load_trained(run)
    data = changed(trained.settings, override, run).data
    result = make_validation(data, packs_per_micro_batch=1).run(trained.forward, ALONE)
    print(f"{run}: {result.nats_per_token:.4f} nats per label")
    if output:
        write_json(output, {"run": str(run), "step": trained.step, "validation": evaluation_text.to_values(result)})


def changed(settings: Settings, overrides: list[str], origin: Path) -> Settings:
    """The settings of a run with others of [data]. Raises `UserError`."""
    table = to_toml_table(settings)
    for override in overrides:
        section, _, rest = override.partition(".")
        key, equals, text = rest.partition("=")
        if section != "data" or not equals:
            raise UserError(f"--set {override}: must have the form data.key=value: only the data can be read otherwise")
        try:
            table["data"][key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            raise UserError(f"--set {override}: the value must be TOML: texts in quotes") from None
    return settings_from_table(table, origin, saved=True)


def main() -> None:
    try:
        typer.run(score)
    except UserError as error:
        print(f"score_run: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
