"""Class weights: scikit-learn's, and a step's sum of weights known from the plan."""

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.class_weights import ClassWeights, balanced
from bigmodel.data.load.stream import Builder
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.objectives.supervised import UNITS
from bigmodel.data.plan.order import Order
from tests.data.plan.test_classes import CLASSES, COUNTS, LabelledStore, store_of

class_weight = pytest.importorskip("sklearn.utils.class_weight")


class ReadStore(LabelledStore):
    def document(self, source: str, shard: int, row: int) -> Pair:  # type: ignore[override]
        text = np.arange(self.lengths(source, shard)[row])
        return Pair(text, np.array([1, self.classes[source][shard][row], 2]))


def data_of(weights: str | dict[str, float], **more: object) -> DataSettings:
    table = {"max_document_length": 24, "sequence_length": 48, "mix": {"mail": 1.0}}
    return DataSettings.model_validate(table | more).with_classes(CLASSES, False, weights)


def test_balanced_weights_are_scikit_learns() -> None:
    labels = [name for name, count in COUNTS.items() for _ in range(count)]
    expected = class_weight.compute_class_weight("balanced", classes=np.array(CLASSES), y=labels)
    assert balanced(list(COUNTS.values()), CLASSES) == pytest.approx(expected.tolist(), rel=1e-15)
    for is_counted in (True, False):
        found = ClassWeights(store_of(2, is_counted=is_counted), data_of("balanced")).values
        assert np.abs(found - expected).max() <= 0.5 / UNITS
    table = {"rare": 2.5, "common": 0.3}
    expected = class_weight.compute_class_weight(table, classes=np.array(CLASSES), y=labels)
    assert ClassWeights(store_of(2), data_of(table)).values.tolist() == pytest.approx(
        expected.tolist(), abs=0.5 / UNITS
    )


def test_balanced_weights_of_a_class_without_documents_are_refused() -> None:
    with pytest.raises(UserError, match=r'weights = "balanced": class \'medium\' has no training document'):
        ClassWeights(LabelledStore({"mail": [[0, 1, 0]]}), data_of("balanced"))


def test_a_batch_has_the_weights_of_its_classes_and_the_plan_knows_their_sum() -> None:
    store = ReadStore({"mail": [[0, 0, 1, 0, 2, 0, 0, 2, 0]]})
    data = data_of({"rare": 3.1, "medium": 0.2}, class_exponent=0.0)
    builder, packs = Builder(store, data, 1), Order(store, data, 4, 1).next_step()
    batch = builder.build(packs, 0, range(4))
    assert batch.weights is not None
    labels, weights = batch.labels.tolist(), batch.weights.tolist()
    by_class = {number: {w for label, w in zip(labels, weights, strict=True) if label == number} for number in range(3)}
    units = [1.0, round(3.1 * UNITS) / UNITS, round(0.2 * UNITS) / UNITS]
    assert by_class == {number: {weight} for number, weight in enumerate(units)}
    assert {weight for label, weight in zip(labels, weights, strict=True) if label < 0} == {0.0}
    assert sum(builder.units_by_group(packs)) == sum(round(weight * UNITS) for weight in weights)
    assert Builder(store, data_of({}), 1).build(packs, 0, range(4)).weights is None
