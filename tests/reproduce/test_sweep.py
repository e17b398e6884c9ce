"""`afa reproduce`: shares of the work, what is done once, and what it prints and writes."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace

import pytest
import support.needs_command_line  # noqa: F401
from PIL import Image
from support.tiny_run import tiny_args
from support.voc_factory import make_voc

from afa_model import cli
from afa_model.config import parse
from afa_model.errors import TrainingError
from afa_model.reproduce import sweep as sweeps
from afa_model.reproduce.paper import paper_table, tables_named
from afa_model.reproduce.report import write_report
from afa_model.reproduce.results import Found, agreement, in_words, results_of
from afa_model.reproduce.scores import keep, kept
from afa_model.reproduce.show import cells, class_cells, markdown, notes, plot
from afa_model.reproduce.sweep import Sweep, SweepSettings, each_alone, work_off
from afa_model.runs.folder import RunFolder

TABLE_1 = [62.4, 62.7, 63.8, 61.5, 59.4]


@pytest.fixture
def sweep(tmp_path):
    """Of all tables, two seeds, with nothing done."""
    return Sweep(parse(["--config", "quick", "--out", str(tmp_path)]), tables_named(["all"], quick=True), [0, 1])


def fill(sweep, miou):
    """Give each row of the networks' tables a score, without training: ``miou(table, number of the row, seed)``."""
    for table in [table for table in sweep.tables if not table.refines]:
        for (number, row), seed in itertools.product(enumerate(table.rows), sweep.seeds):
            path, settings = sweep.scored(table, row, seed)
            if kept(path, settings) is None:  # else it is a row of an earlier table, too
                value = {"miou": miou(table, number, seed) / 100, "iou": {"background": 0.5, "cat": None}}
                keep(path, settings, dict.fromkeys(table.kinds, value))


# --- shares -----------------------------------------------------------------------------------------------------------


def test_shares_are_disjoint_and_complete(sweep):
    pieces = [piece.title for piece in sweep.pieces()]
    assert len(set(pieces)) == len(pieces) == 2 * (1 + 4 + 9 + 4) + 2 * 2
    for count in (1, 2, 3, 50):
        shares = [SweepSettings(shard=f"{number}/{count}").share() for number in range(1, count + 1)]
        parts = [pieces[index::among] for index, among in shares]
        assert sorted(title for part in parts for title in part) == sorted(pieces)


def test_the_full_method_is_trained_once_for_all_tables(sweep):
    first, *others = sweep.pieces()
    assert first.title == "full method, seed 0"
    assert [scoring.path.name for scoring in first.scorings] == ["scores-training.json", "scores-test.json"]
    assert all(len(piece.scorings) == 1 for piece in others if not piece.title.startswith("full method"))
    folders = [piece.scorings[0].path.parent for piece in sweep.pieces() if not piece.title.startswith("Table")]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("wrong", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_a_wrong_shard_is_named(wrong):
    with pytest.raises(ValueError, match=r"^shard: expected I/N with I in 1\.\.N"):
        SweepSettings(shard=wrong)


def test_torchrun_shares_out_and_each_process_trains_alone(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert SweepSettings().share() == (1, 3)
    with each_alone():
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "3")
    for wrong, name in (({"shard": "1/2"}, "shard"), ({"report": "a.md"}, "report")):
        with pytest.raises(ValueError, match=f"^{name}: expected null"):
            SweepSettings(**wrong)


# --- pieces -----------------------------------------------------------------------------------------------------------


def piece_of(sweep, path, find):
    return sweeps.Piece("a piece", [sweeps.Scoring(path, {"a": (1, 2)}, find)])


def test_what_is_done_is_not_done_again_but_under_other_settings_it_is(sweep, tmp_path):
    times = []
    piece = piece_of(sweep, tmp_path / "scores.json", lambda: times.append(1) or {"x": 1})
    assert work_off([piece], print) == [] and work_off([piece], print) == [] and len(times) == 1
    piece.scorings[0].settings = {"a": 3}
    assert work_off([piece], print) == [] and len(times) == 2
    (tmp_path / "scores.json").write_text("{")  # as an editor or a full disk may leave it
    assert work_off([piece], print) == [] and len(times) == 3
    assert kept(tmp_path / "scores.json", {"a": 3}) == {"x": 1}


def test_a_network_that_another_process_is_at_waits_for_the_others(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "WAIT", 0.0)
    order, told = [], []

    def busy():
        order.append("busy")
        if len(order) < 4:
            raise sweeps.InUse("out: in use")
        return {}

    pieces = [piece_of(sweep, tmp_path / "1.json", busy)]
    pieces.append(piece_of(sweep, tmp_path / "2.json", lambda: order.append("free") or {}))
    assert work_off(pieces, told.append) == []
    assert order == ["busy", "free", "busy", "busy"]
    assert sum("left for later" in line for line in told) == 1


def test_one_failure_stops_no_others(sweep, tmp_path):
    def fails():
        raise TrainingError("step 3: not finite")

    pieces = [piece_of(sweep, tmp_path / "1.json", fails), piece_of(sweep, tmp_path / "2.json", dict)]
    assert work_off(pieces, print) == ["a piece: step 3: not finite"]
    assert [piece.done for piece in pieces] == [False, True]


def test_two_processes_never_train_one_network(sweep):
    """A process that is killed leaves its lock to the system: nothing need be cleared away."""
    run = sweep.full(0)
    start = run.start()
    child = os.fork()
    if child == 0:  # the lock is a process's
        RunFolder(start.config)
        os.kill(os.getpid(), 19)  # stop
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        with pytest.raises(sweeps.InUse, match=re.escape(start.config.out)):
            run.make()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    with RunFolder(start.config):
        pass
    assert not run.folder.exists()


def test_scores_of_a_given_network_are_of_what_its_file_holds_and_of_the_data(sweep, tmp_path):
    """The file may be of a run that goes on, and the masks another folder's."""
    file = tmp_path / "best.pt"
    file.write_bytes(b"one")
    given = replace(sweep, checkpoint=file)

    def scored(of):
        table = of.tables[1]
        return of.scored(table, table.rows[0], 0)

    path, settings = scored(given)
    keep(path, settings, {"x": 1})
    same = replace(given, base=replace(given.base, data=replace(given.base.data, num_workers=2)))
    assert kept(*scored(same)) == {"x": 1}
    other = replace(given, base=replace(given.base, data=replace(given.base.data, mask_dir="SegmentationClass")))
    assert kept(*scored(other)) is None
    file.write_bytes(b"two")
    assert kept(*scored(replace(sweep, checkpoint=file))) is None


# --- results ----------------------------------------------------------------------------------------------------------


def test_our_numbers_stand_beside_the_papers(sweep):
    fill(sweep, lambda table, number, seed: 50 + number + 2 * seed)
    found = results_of(sweep, sweep.tables[0])
    assert found.complete and found.rows[1] == Found("r = 4", 62.7, (51.0, 53.0))
    head, rows = cells(found)
    assert head == ["", "here", "paper"] and rows[2] == ["r = 8 (default)", "53.0 ± 1.4", "63.8"]
    assert "| r = 16 | 55.0 ± 1.4 | 59.4 |" in markdown(found).splitlines()
    figure = plot(found)
    figure.canvas.draw()
    here, there = figure.axes
    assert [label.get_text() for label in here.get_yticklabels()][1:4] == ["r = 4", "r = 8 (default)", "r = 12"]
    for axis, numbers in ((here, ["51.0", "52.0", "53.0", "54.0", "55.0"]), (there, [f"{value}" for value in TABLE_1])):
        assert sorted(text.get_text() for text in axis.texts) == sorted(numbers)


def test_a_table_that_is_not_done_says_so(sweep):
    found = results_of(sweep, sweep.tables[0])
    assert not found.complete and cells(found)[1][0] == ["r = 2", "–", "62.4"]
    plot(found)
    fill(replace(sweep, seeds=[0]), lambda table, number, seed: TABLE_1[number % 5])
    found = results_of(sweep, sweep.tables[0])
    said = in_words(found)
    assert said.startswith("Not complete: 5 of 10 numbers are missing. ")
    assert "Some have the number of one seed only" in said
    assert "over the seeds that are done" in notes(found)[0]


def test_classes_that_are_not_vocs_stand_alone(sweep):
    fill(sweep, lambda table, number, seed: 40.0)
    found = results_of(sweep, sweep.tables[-1])
    assert [(row.name, row.paper, row.values) for row in found.classes] == [
        ("background", None, (50.0, 50.0)),
        ("cat", None, ()),
    ]
    assert "nothing of the paper's" in in_words(found)
    assert "| mIoU | 40.0 ± 0.0 |" in markdown(found).splitlines()


def rows_of(*pairs):
    return [Found(f"row {number}", paper, values) for number, (paper, values) in enumerate(pairs)]


def test_agreement_counts_pairs():
    order = agreement(rows_of((1.0, (10.0, 10.2)), (2.0, (11.0, 11.2)), (3.0, (10.0, 14.0)), (3.0, (1.0, 1.0))))
    assert (order.pairs, order.same, order.tau) == (5, 3, pytest.approx(0.2))  # the two of 3.0 are no pair
    assert order.equal == 0 and agreement(rows_of((1.0, (3.0,)), (2.0, (3.0,)), (3.0, (4.0,)))).equal == 1
    assert (order.clear, order.clear_same) == (3, 1)
    single = agreement(rows_of((1.0, (10.0,)), (2.0, (9.0,)), (None, (5.0,)), (4.0, ())))
    assert (single.pairs, single.same, single.tau, single.clear) == (1, 0, -1.0, None)
    assert agreement(rows_of((1.0, (10.0,)), (None, (9.0,)))) is None


@pytest.mark.parametrize(
    "ours, words",
    [
        (TABLE_1, "order holds: of 10 pairs of rows 10 are in it (Kendall's τ +1.00)"),
        ([5, 4, 3, 2, 1], "order holds in part"),
        ([-value for value in TABLE_1], "order does not hold: of 10 pairs of rows 0"),
    ],
)
def test_what_holds_is_said_in_words(sweep, ours, words):
    fill(sweep, lambda table, number, seed: ours[number] if table.name == "table1" else 1.0)
    said = in_words(results_of(sweep, sweep.tables[0]))
    assert words in said
    if ours is TABLE_1:
        assert "Best in both: r = 8 (here 63.8, there 63.8)" in said
    elif ours == [5, 4, 3, 2, 1]:
        assert "Best here: r = 2 (5.0; the paper's 62.4); best there: r = 8 (63.8), which is number 3 of 5" in said


def test_a_tie_is_said_to_be_one(sweep):
    """And the paper's best row is the best here, too, if no other is better."""
    fill(sweep, lambda table, number, seed: [9, 8, 9, 7, 6][number % 5])
    said = in_words(results_of(sweep, sweep.tables[0]))
    assert "of 10 pairs of rows 8 are in it, 1 are equal here (Kendall's τ +0.70)" in said
    assert "Best in both: r = 8 (here 9.0, there 63.8). As good as the best here: r = 2." in said


def test_the_papers_own_method_is_not_called_ours(sweep):
    found = results_of(sweep, sweep.tables[-1])
    classes = tuple(Found(name, 50.0, (40.0,)) for name in found.table.per_class.classes)
    assert class_cells(replace(found, classes=classes))[0] == ["class", "here", "RRM", "1Stage", "AA&LR", "paper"]


def test_a_report_says_of_which_networks_it_is_and_links_to_its_plots(sweep, tmp_path):
    file = tmp_path / "best.pt"
    file.write_bytes(b"one")
    tables = sweep.tables[:2]
    found = [results_of(sweep, table) for table in tables]
    report, *_ = write_report(tmp_path / "my tables.md", replace(sweep, checkpoint=file), found, "afa reproduce")
    first, second = report.read_text().split("<!-- end of table1 -->")
    assert "](my%20tables/table1.png)" in first and (tmp_path / "my tables" / "table1.png").is_file()
    assert "mit_b0, crop 96" in first and "seeds 0, 1;" in first and "that is given" not in first
    assert "the CAM of the network that is given, best.pt; scored on the first 80 pictures" in second
    assert "crop" not in second.split("By `")[1] and "seed" not in second.split("By `")[1]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_from_nothing_to_a_report(tmp_path, capsys, monkeypatch):
    """One network for a table of refinements and the table of classes; a second time nothing is left to do."""
    make_voc(tmp_path / "voc", count=3, splits=("train", "val"))
    settings = tiny_args(tmp_path / "voc", tmp_path / "out", loader__batch_size=2, schedule__max_iters=2)
    line = ["reproduce", "table2", "--quick", *settings, "table6"]
    report = tmp_path / "doc" / "numbers.md"
    report.parent.mkdir()
    report.write_text("# Mine\n\nkept\n\n<!-- afa reproduce: table2 -->\nold\n<!-- end of table2 -->\n\nkept too\n")
    assert cli.main([*line, "--report", str(report)]) == 0
    out = capsys.readouterr().out
    assert "[1 of 2] full method, seed 0" in out and "Table 2, refinements of the CAM, seed 0" in out
    for table in (paper_table("table2", True), paper_table("table6", True)):
        for row in table.rows:
            name = re.escape(row.name + (" (default)" if row.default else ""))
            assert re.search(rf"{name} +\d+\.\d .*{row.paper}", out), row.name
    assert re.search(r"aeroplane +\d+\.\d +75\.9 +70\.4 +76\.3 +79\.5", out)
    networks = sorted(path.name.split("-s0-")[0] for path in (tmp_path / "out").iterdir())
    assert networks == ["default", "start"]

    text = report.read_text()
    assert text.startswith("# Mine\n\nkept\n") and "kept too" in text and "\nold\n" not in text
    assert "| PAR, 1 to 24 (default) |" in text and "The paper's order" in text and "dilations halved" in text
    for name in ("table2", "table6"):
        assert f"](numbers/{name}.png)" in text
        with Image.open(report.parent / "numbers" / f"{name}.png") as picture:
            assert min(picture.size) > 150

    monkeypatch.setattr(sweeps, "segmentation_scores", None)
    monkeypatch.setattr(sweeps, "refinement_scores", None)
    assert cli.main(line) == 0
    again = capsys.readouterr().out
    assert "2 of 2 are done already" in again and "iter " not in again
    shown = again[again.index("Table 2. ") :]
    assert "Table 6. " in shown and shown in out


MISTAKES = {
    "": "no table is asked for: expected some of table1",
    "table7 --quick": "no table 'table7': expected some of table1",
    "table1": "data.root: the full reproduction needs PASCAL VOC 2012",
    "table1 --data.root DATA": "model.pretrained: the full reproduction starts from ImageNet weights",
    "table6 --data.root DATA --model.pretrained false": "table6: the paper's classes are the 21 of VOC",
    "table2 --quick --data.root DATA": "split 'train': DATA/ImageSets/Segmentation/train.txt not found",
    "table1 --data.root DATA --model.pretrained false": "split 'val': DATA/ImageSets/Segmentation/val.txt not found",
    "table1 --quick --shard 3/2": "shard: expected I/N with I in 1..N, such as 1/4, got '3/2'",
    "table1 --quick --shard 1/2 --report a.md": "report: expected null for a share of the rows",
    "table1 --quick --seeds 0": "seeds: expected at least 1",
    "table2 --quick --data.root DATA --checkpoint nowhere.pt": "nowhere.pt",
    "table1 --quick --resume some.pt": "resume: rows go on from their own checkpoints",
    "table1 --quick --labels.raduis 3": "labels.raduis: unknown setting",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_line(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DATA").mkdir()
    (tmp_path / "DATA" / "classes.txt").write_text("background\ncat\n")
    assert cli.main(["reproduce", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("afa reproduce: error: ") and MISTAKES[line] in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["DATA"]
