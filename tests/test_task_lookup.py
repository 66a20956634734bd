"""Tasks by name: lm-eval's own without its whole index, those of a folder, and names that are refused."""

import pytest
from lm_eval.tasks import TaskManager

from cats import task_index
from cats.evaluation import check_tasks, load_tasks
from tests.accuracy_world import world as world


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tiny_words", "no_such_task"], "unknown task no_such_task"),
        ([], "one or more different names"),
        (["tiny_words", "tiny_words"], "one or more different names"),
        (["tiny_without_acc"], "no metric acc"),
    ],
)
def test_wrong_tasks_are_refused(world, names, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, world / "tasks")


def test_a_task_without_its_data_is_one_sentence(world, tmp_path):
    (tmp_path / "gone.yaml").write_text((world / "tasks/tiny_yes.yaml").read_text().replace("tiny_yes", "gone"))
    with pytest.raises(OSError, match="task gone cannot be loaded"):
        load_tasks(["gone"], tmp_path)


def test_lm_evals_own_tasks_are_known_without_a_download(monkeypatch):
    """As its whole index has them, which is read for a name alone that no file or more than one gives to its task."""
    paper = ["openbookqa", "arc_easy", "winogrande", "hellaswag", "arc_challenge", "piqa", "boolq", "sciq", "gsm8k"]
    with monkeypatch.context() as patch:
        patch.setattr(task_index, "all_own_tasks", lambda: pytest.fail("the whole index was read"))
        indices = check_tasks(paper)
    assert list(indices) == paper
    whole = task_index.all_own_tasks()
    for name, index in indices.items():
        assert index.task_index[name] == whole.task_index[name]
    by_include = "AraDiCE_ArabicMMLU_high_stem_physics_egy"
    assert check_tasks([by_include])[by_include] is whole
    for unknown in ("arc_eas", "arc.easy", "ai2_arc", "glue"):  # the last two are a tag and a group
        with pytest.raises(ValueError, match=f"unknown task {unknown}"):
            check_tasks([unknown])


def test_a_name_that_several_files_have_is_the_one_of_the_whole_index(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text("task: twice\ndataset_path: " + folder)
    (tmp_path / "a" / "y.yaml").write_text("'task': \"once\"\n")
    (tmp_path / "b" / "z.yaml").write_text("task: 'thrice'  # quoted\n")
    monkeypatch.setattr(task_index, "OWN", tmp_path)
    whole = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(task_index, "all_own_tasks", lambda: whole)
    task_index._files_of.cache_clear()
    try:
        indices = task_index.own_tasks(["twice", "once", "thrice", "never"])
    finally:
        task_index._files_of.cache_clear()
    assert indices.keys() == {"twice", "once", "thrice"}
    assert indices["twice"] is whole and indices["once"] is whole and indices["thrice"] is not whole
