import doctest
import math
from dataclasses import replace

import pytest
import torch

# The sdist has the tests, but not the benchmarks.
pytest.importorskip("benchmarks", reason="not a checkout")
from benchmarks import elr, paper_tables, repair, repair_tables
from benchmarks.arms import Unit
from benchmarks.cases import DIGITS_CASES, Case
from benchmarks.elr import EarlyLearning
from benchmarks.models import move_towards, spoken_classifier
from benchmarks.plans import ARMS, CONTROLS, plan_of
from benchmarks.repair_tables import Results, Verdict, gap_closed, tables, verdicts


def row(arm, accuracy, seed=0, case="spoken-sym40", regime="memorized", **more):
    found = {"seconds": 10.0, "process_seconds": 10.0, "steps": 100}
    return {"case": case, "regime": regime, "seed": seed, "arm": arm, "accuracy": accuracy, **found, **more}


def naive_regularizers(steps, total, classes, strength, memory):
    """One sample and one class at a time."""
    target = [[0.0] * classes for _ in range(total)]
    answers = []
    for logits, index in steps:
        logs = []
        for line, i in zip(logits.tolist(), index.tolist(), strict=True):
            exps = [math.exp(value) for value in line]
            p = [min(max(value / sum(exps), 1e-4), 1 - 1e-4) for value in exps]
            target[i] = [memory * t + (1 - memory) * q / sum(p) for t, q in zip(target[i], p, strict=True)]
            logs.append(math.log(1 - sum(t * q for t, q in zip(target[i], p, strict=True))))
        answers.append(strength * sum(logs) / len(logs))
    return answers


def test_early_learning_is_the_formula_over_several_steps():
    torch.manual_seed(0)
    steps = [(10 * torch.randn(4, 3), torch.randperm(6)[:4]) for _ in range(5)]
    regularizer = EarlyLearning(total=6, classes=3, strength=3.0, memory=0.7)
    found = [regularizer(logits, index).item() for logits, index in steps]
    assert found == pytest.approx(naive_regularizers(steps, 6, 3, 3.0, 0.7), rel=1e-4)


def test_early_learning_pulls_to_what_was_predicted_first():
    regularizer, index = EarlyLearning(total=1, classes=2), torch.tensor([0])
    for _ in range(10):
        regularizer(torch.tensor([[3.0, 0.0]]), index)
    logits = torch.zeros(1, 2, requires_grad=True)
    regularizer(logits, index).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]
    assert not regularizer.target.requires_grad


@pytest.mark.parametrize("module", [elr, paper_tables, repair_tables])
def test_the_examples_are_right(module):
    assert doctest.testmod(module).failed == 0


def test_there_is_no_gap_to_close_where_the_oracle_is_no_better():
    assert gap_closed(0.9, base=0.905, ceiling=0.91) is None
    assert gap_closed(0.7, base=0.8, ceiling=0.9) == -1


def test_a_lead_is_over_the_seeds_that_both_arms_have():
    rows = [row("F-FT", 0.9, 0), row("F-FT", 0.1, 1), row("continue", 0.8, 0)]
    assert Results(rows).lead("spoken-sym40", "memorized", "F-FT", "continue") == pytest.approx(10)
    assert Results(rows).lead("spoken-sym40", "memorized", "F-FT", "retrain") is None


def test_relabeling_is_judged_against_as_many_steps_as_it_had():
    rows = [row("continue", 0.5), row("continue, steps of relabel", 0.8), row("relabel", 0.9), row("weigh", 0.9)]
    gain = {arm: Results(rows).gain("spoken-sym40", "memorized", arm) for arm in ("relabel", "weigh")}
    assert gain == {"relabel": pytest.approx(10), "weigh": pytest.approx(40)}


def test_verdicts_are_reached_at_the_bound_and_missed_beyond_it():
    assert Verdict("", "", 0.7 - 0.65, 0.05).reached
    assert not Verdict("", "", 0.04, 0.05).reached
    assert Verdict("", "", 0.35, 0.35, at_most=True).reached
    assert not Verdict("", "", 0.36, 0.35, at_most=True).reached


def test_memorized_targets_are_judged_with_the_numbers_there_are():
    rows = [
        row("base", 0.6),
        row("F-FT", 0.86, steps=40),
        row("continue", 0.8),
        row("retrain", 0.864),
        row("truly clean, retrained, same steps", 0.9),
    ]
    found = {verdict.target: verdict for verdict in verdicts(Results(rows))}
    assert {target.removeprefix("memorized: "): verdict.reached for target, verdict in found.items()} == {
        "points of F-FT against retrain, in full": False,
        "steps of F-FT relative to retrain": True,
        "share of the gap closed by F-FT": False,
        "points of F-FT against continue": True,
    }


def test_clean_data_must_not_be_lost_and_cleanlab_not_be_better_on_published_errors():
    rows = [row(arm, 0.9, case="digits-clean", regime="fresh") for arm in ("continue", "cleanlab, retrain")]
    rows += [row("F-FT", 0.89, case="digits-clean", regime="fresh")]
    rows += [row(arm, 0.7, case="hate", regime="fresh") for arm in ("F-FT", "continue", "cleanlab, retrain")]
    found = {(verdict.target, verdict.case): verdict.reached for verdict in verdicts(Results(rows))}
    assert found == {
        ("fresh: points of F-FT against continue", "hate"): True,
        ("fresh, clean: points of F-FT against continue", "digits-clean"): False,
        ("fresh: points of F-FT against cleanlab, retrain", "hate"): True,
    }


def test_tables_have_a_column_for_every_arm_that_ran():
    text = tables(Results([row("base", 0.6), row("base", 0.7, 1), row("ELR", 0.8)]))
    assert "| case | base | ELR |" in text
    assert "| spoken-sym40 | 65.0 ± 7.1 | 80.0 |" in text


def paper_row(arm, accuracy, seed=0, **more):
    metrics = dict.fromkeys(("precision", "recall", "f1", "top3"), accuracy)
    of = {"task": "cifar10", "noise": "paper", "train_size": 4000, "seed": seed, "arm": arm}
    return of | metrics | {"accuracy": accuracy, "seconds": 20.0, "process_seconds": 10.0, "epochs": 10} | more


def test_the_papers_figures_stand_beside_ours():
    quality = {"auroc": 0.9, "flagged": 0.5, "true_rate": 0.5}
    of_partition = {"partition": quality, "acted": True, "partition_seconds": 2.0, "prune_seconds": 1.0, "pruned": 40}
    rows = [
        paper_row("initial", 0.5, steps=100),
        paper_row("initial", 0.6, seed=1, steps=100),
        paper_row("rlap, F-FT", 0.7, steps=50, **of_partition),
        paper_row("prune random, L-FT", 0.4, steps=50, **of_partition),
    ]
    text = paper_tables.tables(rows)
    initial = next(line for line in text.splitlines() if line.startswith("| initial |"))
    assert initial.startswith("| initial | 55.00 ± 7.07 | ")
    assert initial.endswith("| 100 ± 0 | 2.00 ± 0.00 | 1.00 ± 0.00 |  | 69.44 (P 69.62, F1 69.62, 20.48 s) | 61.96 |")
    ours = next(line for line in text.splitlines() if line.startswith("| rlap, F-FT |"))
    assert ours.endswith("| 50 | 2.00 | 1.00 | 3.0 | 80.20 (P 80.75, F1 80.24, 14.44 s) | 72.53 |")
    assert "| rlap | 0.900 | 0.500 |  |  |  | 0.500 | 1 of 1 |" in text
    assert "| random | 40.00 |  | 40 |" in text
    # It has printed none of other noise.
    assert "the paper, 50k" not in paper_tables.tables([row | {"noise": "gaussian"} for row in rows])


def test_large_networks_are_trained_for_as_long_with_a_repair_as_without():
    for depth in (18, 34):
        case = Case("full", "cifar", "human", depth=depth)
        plan = plan_of(case, "fresh")
        assert case.batch == 512
        assert plan.base_epochs + plan.repair_epochs == plan.alone_epochs <= 130
        weight = [torch.nn.Parameter(torch.zeros(1))]
        for make in (plan.optimizer, plan.base_optimizer):
            (group,) = make(weight).param_groups
            assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.9, 5e-4)
    small = plan_of(Case("small", "cifar", "human"), "memorized")
    assert isinstance(small.base_optimizer(weight), torch.optim.Adam)
    assert small.base_optimizer(weight).param_groups[0]["weight_decay"] == 0


def test_cross_entropy_takes_all_the_data_and_epochs_of_its_own(tmp_path):
    unit = Unit(DIGITS_CASES["digits-clean"], "fresh", 0, folder=tmp_path, data=tmp_path, accelerator="cpu", fast=True)
    unit.plan = replace(unit.plan, base_epochs=1, repair_epochs=1, alone_epochs=2)
    batches = len(unit._loader())
    assert unit.result("cross-entropy")["steps"] == 2 * batches
    assert unit._one_cycle(unit._loader(), 2).configure_optimizers()["lr_scheduler"]["scheduler"].total_steps == (
        2 * batches
    )


def test_every_control_but_a_full_retraining_has_the_steps_of_fine_tuning(tmp_path):
    unit = Unit(
        DIGITS_CASES["digits-sym40"], "memorized", 0, folder=tmp_path, data=tmp_path, accelerator="cpu", fast=True
    )
    unit.plan = replace(unit.plan, base_epochs=2, repair_epochs=1)
    steps = {arm: unit.result(arm)["steps"] for arm in ("F-FT", "F-FT start", *CONTROLS)}
    short = {steps[arm] for arm in steps if arm != "retrain"}
    assert short == {steps["F-FT"]} != {steps["retrain"]}


def test_the_networks_that_cleanlab_asks_count_in_its_time(tmp_path, monkeypatch):
    pytest.importorskip("cleanlab")
    unit = Unit(DIGITS_CASES["digits-sym40"], "fresh", 0, folder=tmp_path, data=tmp_path, accelerator="cpu", fast=True)
    alone = {"seconds": 1.0, "process_seconds": 0.5, "steps": 7}
    monkeypatch.setattr(unit, "_retrain", lambda index: dict(alone))
    found = unit.run("cleanlab, retrain")
    assert found["steps"] == 7
    assert found["process_seconds"] > 0.6
    assert found["seconds"] > 1.1


def test_moving_towards_weights_starts_the_statistics_of_the_norms_anew():
    torch.manual_seed(0)
    model, other = spoken_classifier(), spoken_classifier()
    start, goal = model.head.weight.clone(), other.head.weight
    batches = list(torch.randn(3, 8, 1, 16, 16))
    move_towards(model, other.state_dict(), 0.25, batches)
    assert torch.allclose(model.head.weight, start + 0.25 * (goal - start))
    convolution, norm = model.blocks[0][:2]
    mean = torch.stack([convolution(x).mean(dim=(0, 2, 3)) for x in batches]).mean(dim=0)
    assert torch.allclose(norm.running_mean, mean, atol=1e-5)
    assert norm.momentum == 0.1


def defaults_of(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["repair", *words])
    args = repair._arguments()
    return {name: list(getattr(args, name)) for name in ("cases", "regimes", "arms", "seeds")}


def test_a_scale_has_its_defaults_and_an_option_goes_before_them(monkeypatch):
    main = [
        "base",
        "F-FT",
        "F-FT keep",
        "continue",
        "retrain, same steps",
        "retrain",
        "truly clean, retrained, same steps",
    ]
    main += ["shrink, all data", "relabel", "rounds", "rounds + relabel", "oracle", "cross-entropy", "ELR"]
    assert defaults_of(monkeypatch) == {
        "cases": ["cifar-human", "spoken-sym40"],
        "regimes": ["memorized", "fresh"],
        "arms": [*main, "continue, steps of relabel"],
        "seeds": [0],
    }
    assert defaults_of(monkeypatch, "--scale", "gpu") == {
        "cases": ["cifar-human-full", "cifar-human-full-34"],
        "regimes": ["fresh"],
        "arms": main,
        "seeds": [0, 1, 2],
    }
    of_all = defaults_of(monkeypatch, "--scale", "cpu-all", "--seeds", "7")
    assert (len(of_all["cases"]), len(of_all["regimes"]), of_all["seeds"]) == (9, 2, [7])
    assert of_all["arms"] == list(ARMS)
