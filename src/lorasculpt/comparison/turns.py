"""A comparison on tasks that are learned in turn: its runs, and what those that are done say."""

from __future__ import annotations

import shlex
from functools import cached_property

from ..provenance import versions
from ..run.folder import check_output
from ..run.records import training_rows
from ..sequence import grown, learn, stages_of
from . import sequences
from .plan import RATES, TESTED, Comparison


class Sequences(Comparison):
    """A `Comparison` whose runs each learn several tasks in turn (`lorasculpt.sequence`).

    The source is that of ``evaluate``, the target that of each task. Where the tasks have ``validation`` files, a trial
    is the whole sequence, measured on those files; its score is ``last``. Otherwise nothing is chosen: a label has the
    rate that it says, or the one of ``rates`` (default: ``training.lr``).

    Raises:
        UserError: also for a label that learns no sequence, or that a sequence cannot be learned as it says.
    """

    rows = "sequences"

    def __init__(self, config, methods=None, seeds=3, rates=None, results=None):
        super().__init__(config, methods, seeds, rates, results)
        for label, what in self.labels.items():
            if len(what.rates) > 1 and not self._validated(config):
                place = f"methods.{label}" if "rates" in config.methods.get(label, {}) else "data.sequence"
                words = "has no validation set to choose a learning rate on; give one rate, or each task such a file."
                raise config.error(place, words)
            if what.edit or what.replay:
                key = "edit" if what.edit else "replay"
                raise config.error(f"methods.{label}.{key}", "is not for a sequence; remove the label.")
            grown(config.single(label, what.method))

    def _check(self, config):
        if not config.evaluate.source:
            raise config.error("evaluate", "must name source, which is to be kept; the target is that of each task.")
        tests = [stage.test for stage in config.data.sequence]
        for number, stage in enumerate(config.data.sequence):
            if stage.validation in tests:
                place = f"data.sequence.{number}.validation"
                raise config.error(place, "is a file that is tested on; rates may not be chosen on it.")

    def _validated(self, config):
        return all(stage.validation for stage in config.data.sequence)

    def _rates(self, config):
        return RATES if self._validated(config) else [config.training.lr]

    def _asked(self, group):
        stages = [
            stage.model_copy(update={"test": stage.test if group == "test" else stage.validation, "validation": None})
            for stage in self.config.data.sequence
        ]
        return {"sequence": stages}, super()._asked(group)[1] | TESTED

    @cached_property
    def _data(self):
        return [training_rows(stage, check_images=False).data for stage in stages_of(self.config)]

    @property
    def _validation(self):
        return "data.sequence"

    def _same_questions(self, found):
        return True

    def _beside_majority(self, run):
        return run

    def _scored(self, result):
        return sequences.scores(result)

    def _read(self, run):
        found = sequences.entry(run.config)
        if found is None:
            return self._diverged(run)
        check_output(run.config.output, run.config)
        return found

    def _make(self, run, progress):
        learn(run.config, progress=progress)
        self._compare_base(run)

    def command(self, run):
        return f"lorasculpt train {shlex.quote(str(run.write()))}"

    def record(self):
        """As that of one task, with ``sequences`` in place of runs (`lorasculpt.comparison.sequences`)."""
        runs, missing = self._done(), self.missing()
        return {
            "schema": 1,
            "complete": not missing,
            "missing": missing,
            "versions": versions(),
            "tasks": [stage.name for stage in self.config.data.sequence],
            "validation": self._chosen_on,
            "rates": self.rates_of(),
            "trials": self._tried(),
            "sequences": runs,
            "table": self._rows(runs, sequences.table),
        }
