"""Writes the Grafana dashboards of configs/grafana from `tools.dashboards`, by Grafana's own library for it.

    python -m tools.write_dashboards

The library makes JSON that Grafana 11 and 12 import: the types of panels and their options are its business.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders.common import StackingConfig
from grafana_foundation_sdk.builders.dashboard import Dashboard as DashboardBuilder
from grafana_foundation_sdk.builders.dashboard import (
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Number
from grafana_foundation_sdk.builders.statetimeline import Panel as States
from grafana_foundation_sdk.builders.table import Panel as Table
from grafana_foundation_sdk.builders.timeseries import Panel as Lines
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from tools.dashboards import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parents[1] / "configs/grafana"
SOURCE = DataSourceRef("prometheus", "$source")
ROW_HEIGHT = {"number": 4}  # else 8
KINDS: dict[str, Any] = {"lines": Lines, "stacked": Lines, "number": Number, "states": States, "table": Table}
PERCENT = ("progress", "goodput")  # columns of a table


def panel_of(panel: Panel) -> Any:
    """The library's builder of a panel."""
    made = KINDS[panel.kind]().title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    made = made.span(panel.width).height(ROW_HEIGHT.get(panel.kind, 8))
    for number, query in enumerate(panel.queries):
        target = Dataquery().expr(query.text).legend_format(query.legend).ref_id(chr(ord("A") + number))
        target = target.datasource(SOURCE)
        if panel.kind == "table":
            target = target.instant().format(PromQueryFormat.TABLE)
        made = made.with_target(target)
    if panel.kind == "stacked":
        made = made.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    return in_columns(made, panel) if panel.kind == "table" else made


def in_columns(made: Any, panel: Panel) -> Any:
    """A line per run, a column per query."""
    names = {f"Value #{chr(ord('A') + number)}": query.legend for number, query in enumerate(panel.queries)}
    made = made.with_transformation(DataTransformerConfig(id_val="merge", options={}))
    renamed = {"excludeByName": {"Time": True}, "renameByName": names}
    made = made.with_transformation(DataTransformerConfig(id_val="organize", options=renamed))
    for name in PERCENT:
        made = made.override_by_name(name, [DynamicConfigValue("unit", "percentunit")])
    return made


def dashboard_of(name: str, dashboard: Dashboard) -> Any:
    """The library's dashboard."""
    made = (
        DashboardBuilder(dashboard.title)
        .uid(f"bigmodel-{name}")
        .description(dashboard.description)
        .tags(["bigmodel"])
        .refresh("30s")
        .time("now-6h", "now")
        .editable()
        .link(DashboardLink("bigmodel").type(DashboardLinkType.DASHBOARDS).tags(["bigmodel"]).include_vars(True).keep_time(True))
        .with_variable(DatasourceVariable("source").label("source").type("prometheus"))
    )  # fmt: skip
    for variable, query in (
        ("run", "label_values(bigmodel_steps_total, run)"),
        ("node", 'label_values(bigmodel_rank_up{run=~"$run"}, node)'),
    ):
        made = made.with_variable(
            QueryVariable(variable)
            .label(variable)
            .datasource(SOURCE)
            .query(query)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".+")
        )
    numbers = itertools.count(1)
    for title, panels in dashboard.rows:
        made = made.with_row(Row(title).id(next(numbers)))
        for panel in panels:
            made = made.with_panel(panel_of(panel).id(next(numbers)))
    return made.build()


def texts() -> dict[str, str]:
    """File name -> JSON."""
    return {
        f"{name}.json": JSONEncoder(sort_keys=True, indent=1).encode(dashboard_of(name, dashboard)) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        json.loads(text)
        (FOLDER / name).write_text(text)
