"""What the runner does with stages: once, after what they need, and elsewhere where their trainer asks for it."""

import pytest

from pave_lightning import Recipe
from pave_lightning.errors import PaveError
from pave_lightning.pipeline.commands import open_folder
from pave_lightning.pipeline.context import Context
from pave_lightning.pipeline.results import Results
from pave_lightning.pipeline.runner import Runner
from pave_lightning.pipeline.stage import Stage


class Piece(Stage):
    """A stage that writes its name."""

    command = "piece"

    def __init__(self, results, name, *, needs=(), devices=1, task=None, inputs=None):
        super().__init__(results)
        self.label, self._needs, self.devices, self.task = name, needs, devices, task
        self.values = {} if inputs is None else inputs

    @classmethod
    def all(cls, results):
        return ()

    @property
    def name(self):
        return f"pieces/{self.label}"

    @property
    def trainer(self):
        return {"devices": self.devices, "accelerator": "cpu"}

    def about(self):
        return self.label

    def needs(self):
        return self._needs

    def depends_on(self):
        return dict(self.values)

    def run(self, context):
        with context.writing(self) as writer:
            (writer.path / "text").write_text(self.label)


class OnDemand(Piece):
    """One that is made by whatever needs it."""

    command = "other"
    on_demand = True


class FakeLauncher:
    """Notes what is launched; makes what it is told to, as the processes of a command would."""

    def __init__(self, made=()):
        self.made, self.launched, self.there = made, [], []

    def run(self, stage, recipe, folder, task, tracker, *, processes=1):
        self.launched.append((stage, task))
        self.there.append(sorted(path.name for path in folder.root.glob("pieces/*")))
        for piece in self.made:
            with folder.writing(piece.name, piece.inputs()) as writer:
                (writer.path / "text").write_text("elsewhere")


@pytest.fixture
def results(ready_settings):
    recipe = Recipe.model_validate(ready_settings)
    return Results(recipe, open_folder(recipe))


def text(results, stage):
    return (results.path(stage) / "text").read_text()


def test_stages_are_made_once_and_again_where_their_inputs_changed(results):
    runner, first = Runner(Context(results)), Piece(results, "a")
    runner.run([first])
    stamp = (results.path(first) / "manifest.json").stat().st_mtime_ns
    runner.run([first, Piece(results, "a")])
    assert (results.path(first) / "manifest.json").stat().st_mtime_ns == stamp
    runner.run([Piece(results, "a", inputs={"more": 1})])
    assert not results.is_there(first)


def test_what_is_made_on_demand_is_made_where_it_is_needed_and_only_then(results):
    runner, needed = Runner(Context(results)), OnDemand(results, "needed")
    runner.run([needed])
    assert not results.is_there(needed)
    last = Piece(results, "last", needs=[needed])
    runner.run([last])
    assert results.is_there(needed)
    # It may be cleared away: what was made of it stays.
    for file in results.path(needed).iterdir():
        file.unlink()
    results.path(needed).rmdir()
    runner.run([last])
    assert not results.is_there(needed)


def test_a_stage_that_breaks_off_leaves_nothing_and_goes_on_from_what_it_needs(results):
    needed = OnDemand(results, "needed")

    class Broken(Piece):
        def run(self, context):
            with context.writing(self) as writer:
                (writer.path / "half").write_text("half")
                raise PaveError("no")

    runner = Runner(Context(results))
    with pytest.raises(PaveError, match=r"^no$"):
        runner.run([Broken(results, "broken", needs=[needed])])
    assert [path.name for path in results.folder.path("pieces").iterdir()] == ["needed"]


def test_inputs_count_as_they_were_when_the_work_began(results):
    class Changing(Piece):
        def run(self, context):
            self.values["edited"] = True
            super().run(context)

    stage = Changing(results, "a", inputs={"edited": False})
    Runner(Context(results)).make(stage)
    assert results.folder.manifest(stage.name).inputs == {"edited": False}
    assert results.state(stage) == "stale"


def test_distributed_stages_of_a_command_share_one_launch_after_all_that_they_need(results):
    needs = [OnDemand(results, name) for name in ("first", "second")]
    pieces = [Piece(results, f"piece{place}", needs=[one], devices=2) for place, one in enumerate(needs)]
    launcher = FakeLauncher(pieces)
    Runner(Context(results), launcher).run(pieces)
    assert launcher.launched == [("piece", None)]
    assert launcher.there == [["first", "second"]]
    assert {text(results, piece) for piece in pieces} == {"elsewhere"}


def test_distributed_stages_of_tasks_are_launched_apart(results):
    pieces = [Piece(results, task.name, devices=2, task=task) for task in results.recipe.tasks]

    class OneTask(FakeLauncher):
        def run(self, stage, recipe, folder, task, tracker, *, processes=1):
            self.made = [piece for piece in pieces if piece.task.name == task]
            super().run(stage, recipe, folder, task, tracker)

    launcher = OneTask()
    Runner(Context(results), launcher).run(pieces)
    assert launcher.launched == [("piece", "words"), ("piece", "more")]


def test_a_launch_that_leaves_no_manifest_is_no_success(results):
    piece = Piece(results, "a", devices=2)
    with pytest.raises(PaveError, match="pieces/a is not there yet; run `pave piece`"):
        Runner(Context(results), FakeLauncher()).run([piece])


def test_inside_a_launched_process_nothing_is_launched(results):
    piece = Piece(results, "a", devices=2)
    Runner(Context(results)).run([piece])
    assert text(results, piece) == "a"
