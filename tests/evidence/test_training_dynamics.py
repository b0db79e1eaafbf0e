import io

import pytest
import torch

from lightning_unlearn.evidence.training_dynamics import PHASES, TrainingDynamics
from lightning_unlearn.functional.attribution import label_margin
from lightning_unlearn.functional.coordinates import MAX_COORDINATES, class_coordinates
from lightning_unlearn.functional.soft_margin import NUM_SCALES, soft_margins
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks

N, C = 23, 4


def passes(seed=0, count=3, batch=7):
    """(phase, batches of index, logits, label) for a few passes over all samples but the last two."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, C, (N,), generator=generator)
    for p in range(count):
        order = torch.randperm(N - 2, generator=generator)
        yield (
            (0, 3, 3)[p % 3],
            [
                (index, 3 * torch.randn(len(index), C, generator=generator), label[index])
                for index in order.split(batch)
            ],
        )


def gathered(plan):
    trajectory = TrainingDynamics(N, C)
    for phase, batches in plan:
        for index, logits, label in batches:
            trajectory.observe(index, logits, label)
        trajectory.merge(phase, no_reduce)
    return trajectory


def naive(plan):
    """Lists of the logits of every sample in every phase, and of its scores in all."""
    phases = [[[] for _ in range(N)] for _ in range(PHASES)]
    scores = [[] for _ in range(N)]
    for phase, batches in plan:
        for index, logits, label in batches:
            for i, row, y in zip(index.tolist(), logits, label.tolist(), strict=True):
                phases[phase][i].append(row)
                margin = row[y] - max(row[c] for c in range(C) if c != y)
                p = row.softmax(dim=0)
                entropy = -sum(q * q.log() for q in p)
                scores[i].append(torch.stack([margin, 1 / (1 + (-margin).exp()), entropy]))
    return phases, scores


def assert_equal(found, expected):
    everyone = torch.arange(N)
    for a, b in zip(found.phases(everyone), expected.phases(everyone), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for name, value in expected.scores(everyone).items():
        torch.testing.assert_close(found.scores(everyone)[name], value)


def test_phases_and_scores_match_a_loop():
    plan = list(passes())
    trajectory = gathered(plan)
    phases, scores = naive(plan)
    seen = torch.arange(N - 2)
    basis = class_coordinates(C)
    found = trajectory.phases(seen)
    assert len(found) == 2
    for mean, phase in zip(found, (0, 3), strict=True):
        expected = torch.stack([torch.stack(phases[phase][i]).mean(dim=0) @ basis for i in seen])
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    expected = torch.stack([torch.stack(scores[i]).mean(dim=0) for i in seen])
    for column, name in enumerate(("margin", "label_confidence", "uncertainty")):
        torch.testing.assert_close(trajectory.scores(seen)[name], expected[:, column], atol=1e-5, rtol=1e-5)


def test_rows_come_in_the_order_asked():
    trajectory = gathered(list(passes()))
    order = torch.tensor([5, 0, 5])
    assert torch.equal(trajectory.phases(order)[0], trajectory.phases(torch.arange(N))[0][order])
    assert torch.equal(trajectory.scores(order)["margin"], trajectory.scores(torch.arange(N))["margin"][order])


def test_a_sample_seen_twice_in_one_call_counts_twice():
    logits = torch.tensor([[2.0, 0, 0, 0], [0.0, 4, 0, 0], [6.0, 0, 0, 0]])
    trajectory = TrainingDynamics(N, C)
    trajectory.observe(torch.tensor([3, 3, 4]), logits, torch.zeros(3, dtype=torch.int64))
    trajectory.merge(0, no_reduce)
    (phase,) = trajectory.phases(torch.tensor([3, 4]))
    torch.testing.assert_close(phase, torch.stack([logits[:2].mean(dim=0), logits[2]]) @ class_coordinates(C))
    assert trajectory.scores(torch.tensor([3, 4]))["margin"].tolist() == [(2 - 4) / 2, 6]


def test_samples_that_a_phase_has_not_seen_are_nan_in_it():
    trajectory = TrainingDynamics(N, C)
    assert trajectory.phases(torch.arange(N)) == []
    one = torch.zeros(1, dtype=torch.int64)
    trajectory.observe(one + 2, torch.randn(1, C), one)
    trajectory.merge(1, no_reduce)
    (phase,) = trajectory.phases(torch.arange(N))
    assert phase.isnan().all(dim=1).nonzero().flatten().tolist() == [i for i in range(N) if i != 2]
    assert phase[2].isfinite().all()
    trajectory.observe(one + 5, torch.randn(1, C), one)
    trajectory.merge(0, no_reduce)
    first, second = trajectory.phases(torch.tensor([2, 5]))
    assert first.isnan().all(dim=1).tolist() == [True, False]
    assert second.isnan().all(dim=1).tolist() == [False, True]


def test_what_belongs_to_no_phase_counts_in_the_scores_alone():
    trajectory, everyone = gathered(list(passes())), torch.arange(N)
    before = [phase.clone() for phase in trajectory.phases(everyone)]
    score = trajectory.scores(everyone)["margin"][0]
    trajectory.observe(torch.tensor([0]), torch.tensor([[9.0, 0, 0, 0]]), torch.tensor([0]))
    trajectory.merge(None, no_reduce)
    for one, other in zip(before, trajectory.phases(everyone), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    # Three passes before, one more now.
    torch.testing.assert_close(trajectory.scores(everyone)["margin"][0], (3 * score + 9) / 4)


def test_nothing_counts_before_the_merge():
    trajectory = gathered(list(passes()))
    other = gathered(list(passes()))
    other.observe(torch.arange(5), torch.randn(5, C), torch.zeros(5, dtype=torch.int64))
    assert_equal(other, trajectory)


def test_a_margin_of_attributions_takes_the_place_of_that_of_the_logits():
    margin = torch.tensor([-1.0, 2.0])
    trajectory = TrainingDynamics(N, C)
    trajectory.observe(torch.arange(2), torch.randn(2, C), torch.zeros(2, dtype=torch.int64), margin)
    trajectory.merge(0, no_reduce)
    scores = trajectory.scores(torch.arange(2))
    assert torch.equal(scores["margin"], margin)
    torch.testing.assert_close(scores["label_confidence"], margin.sigmoid())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_overflowed_leaves_no_trace(value):
    # As under 16-bit training, whose loss scale is found by overflowing: once in three passes, for five samples.
    plan = list(passes())
    whole = gathered(plan)
    overflowed = TrainingDynamics(N, C)
    for phase, batches in plan:
        for index, logits, label in batches:
            overflowed.observe(index, logits, label)
        if phase == 0:
            index = torch.arange(5)
            broken = torch.randn(5, C)
            broken[:, 1] = value
            overflowed.observe(index, broken, whole.label[:5])
            assert overflowed.rows_left_out == 5
        overflowed.merge(phase, no_reduce)
        assert overflowed.rows_left_out == 0
    assert_equal(overflowed, whole)


def test_rows_whose_sum_overflows_count_where_each_is_finite():
    trajectory = TrainingDynamics(N, C)
    trajectory.observe(torch.arange(3), torch.tensor([[0.0, 0.0, 0.0, -2e38]]).expand(3, C), torch.zeros(3).long())
    assert trajectory._fresh.sum(dim=0).isinf().any()
    assert trajectory.rows_left_out == 0
    assert trajectory._fresh[:3, -4].tolist() == [1, 1, 1]


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_uncertainty_is_the_entropy_in_nats(classes):
    torch.manual_seed(0)
    logits = 5 * torch.randn(64, classes)
    trajectory = TrainingDynamics(64, classes)
    trajectory.observe(torch.arange(64), logits, torch.zeros(64).long())
    trajectory.merge(0, no_reduce)
    expected = torch.distributions.Categorical(logits=logits.double()).entropy().float()
    torch.testing.assert_close(trajectory.scores(torch.arange(64))["uncertainty"], expected, rtol=1e-5, atol=1e-5)


def test_a_margin_that_is_not_finite_leaves_its_row_out_but_not_its_label():
    trajectory = TrainingDynamics(N, C)
    trajectory.observe(torch.arange(2), torch.randn(2, C), torch.tensor([1, 2]), torch.tensor([torch.nan, 1.0]))
    assert trajectory.rows_left_out == 1
    trajectory.merge(0, no_reduce)
    (phase,) = trajectory.phases(torch.arange(2))
    assert phase.isnan().any(dim=1).tolist() == [True, False]
    assert trajectory.scores(torch.arange(2))["margin"].tolist() == [0, 1]
    assert trajectory.label[:2].tolist() == [1, 2]
    trajectory.observe(torch.arange(1), torch.full((1, C), torch.nan), torch.tensor([1]))
    trajectory.forget()
    assert trajectory.rows_left_out == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_logits_of_another_precision_that_require_grad(dtype):
    logits = torch.randn(3, C).to(dtype).requires_grad_()
    trajectory, expected = TrainingDynamics(N, C), TrainingDynamics(N, C)
    label = torch.zeros(3, dtype=torch.int64)
    trajectory.observe(torch.arange(3), logits, label)
    expected.observe(torch.arange(3), logits.detach().float(), label)
    for each in (trajectory, expected):
        each.merge(0, no_reduce)
    assert_equal(trajectory, expected)


def test_forget_leaves_what_a_new_one_holds():
    trajectory = gathered(list(passes()))
    trajectory.observe(torch.arange(3), torch.randn(3, C), torch.zeros(3, dtype=torch.int64))
    trajectory.forget()
    assert trajectory.phases(torch.arange(N)) == []
    assert (trajectory.label == -1).all()
    for phase, batches in passes(seed=1):
        for batch in batches:
            trajectory.observe(*batch)
        trajectory.merge(phase, no_reduce)
    assert_equal(trajectory, gathered(list(passes(seed=1))))


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_goes_into_a_checkpoint_and_back():
    first, second, third = passes()
    whole = gathered([first, second, third])
    before = gathered([first, second])
    resumed = TrainingDynamics.from_state_dict(saved_and_loaded(before.state_dict()))
    assert (len(resumed), resumed.num_classes) == (N, C)
    assert torch.equal(resumed.label, before.label)
    phase, batches = third
    for batch in batches:
        resumed.observe(*batch)
    resumed.merge(phase, no_reduce)
    assert_equal(resumed, whole)


def test_state_is_a_copy():
    trajectory = gathered(list(passes()))
    state = trajectory.state_dict()
    resumed = TrainingDynamics.from_state_dict(state)
    trajectory.forget()
    assert_equal(resumed, gathered(list(passes())))
    assert state["phases"].abs().sum() > 0


def test_at_rest_it_takes_no_room_for_what_is_observed_next():
    plan = list(passes())
    whole, resting = gathered(plan), TrainingDynamics(N, C)
    for phase, batches in plan:
        resting.rest()
        assert tensor_bytes(vars(resting).values()) < tensor_bytes(vars(whole).values()) - 4 * N * (C + 3) + 100
        assert resting.agreement().tolist() == [0, 0]
        resting.rest()
        for batch in batches:
            resting.observe(*batch)
        resting.merge(phase, no_reduce)
    for name, value in whole.state_dict().items():
        assert (
            value == resting.state_dict()[name] if isinstance(value, int) else value.equal(resting.state_dict()[name])
        )


def test_some_rows_by_themselves():
    whole = gathered(list(passes()))
    part = whole.part(torch.tensor([4, 0, -1]))
    for mine, yours in zip(part.phases(torch.arange(3)), whole.phases(torch.tensor([4, 0])), strict=True):
        assert mine[:2].equal(yours)
        assert mine[2].isnan().all()
    assert part.label.tolist() == [*whole.label[[4, 0]].tolist(), -1]
    assert part.scores(torch.arange(3))["margin"].tolist() == [
        *whole.scores(torch.tensor([4, 0]))["margin"].tolist(),
        0,
    ]


def test_a_rank_without_samples_of_a_phase_has_as_many_phases_as_the_others():
    def gathered_by(rank, reduce):
        trajectory = TrainingDynamics(3, C)
        if rank == 1:
            trajectory.observe(torch.tensor([0]), torch.randn(1, C), torch.tensor([0]))
        trajectory.merge(1, reduce)
        return trajectory

    for trajectory in run_ranks(gathered_by, 2):
        assert len(trajectory.phases(torch.arange(3))) == 1
        assert not trajectory.is_empty
        assert len(TrainingDynamics.from_state_dict(trajectory.state_dict()).phases(torch.arange(3))) == 1
        assert trajectory.make_room(0, 1) == 1
        assert trajectory.make_room(0, 2) == 0


def tensor_bytes(values):
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("classes", "held", "saved"),
    [(10, 236, 184), (65, 1336, 1064), (129, 2616, 2088), (200, 236, 184), (10_000, 236, 184), (2, 76, 56)],
)
def test_bytes_per_sample(classes, held, saved):
    # Of ten thousand, less nothing at all, so that the basis does not count.
    def grown(of):
        return (
            tensor_bytes(of(TrainingDynamics(10_000, classes))) - tensor_bytes(of(TrainingDynamics(0, classes)))
        ) / 10_000

    assert grown(lambda trajectory: vars(trajectory).values()) == held
    assert grown(lambda trajectory: trajectory.state_dict().values()) == saved
    r = classes - 1 if classes - 1 <= MAX_COORDINATES else NUM_SCALES
    assert (held, saved) == (20 * r + 56, 16 * r + 40)


def test_under_autocast_sums_are_in_single_precision():
    logits, label = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    plain, mixed = TrainingDynamics(9, 5), TrainingDynamics(9, 5)
    plain.observe(torch.arange(9), logits, label)
    with torch.autocast("cpu", torch.bfloat16):
        mixed.observe(torch.arange(9), logits, label)
        assert mixed.coordinates(logits).equal(plain.coordinates(logits))
    for trajectory in (plain, mixed):
        trajectory.merge(0, lambda part: part)
    assert plain.phases(torch.arange(9))[0].equal(mixed.phases(torch.arange(9))[0])


def test_a_pass_that_did_not_reach_its_end_leaves_nothing():
    plan = list(passes())
    whole, again = gathered(plan), gathered(plan[:2])
    for index, logits, label in plan[2][1][:2]:
        again.observe(index, logits * torch.nan if len(index) < 3 else logits, label)
    again.drop()
    for index, logits, label in plan[2][1]:
        again.observe(index, logits, label)
    again.merge(plan[2][0], no_reduce)
    for name, value in whole.state_dict().items():
        assert value == again.state_dict()[name] if isinstance(value, int) else value.equal(again.state_dict()[name])


def wide_logits(total, outputs, seed=3):
    return torch.randn(total, outputs, generator=torch.Generator().manual_seed(seed))


def test_of_many_outputs_the_classes_of_the_first_epoch_get_coordinates():
    index, label, logits = torch.arange(40), 30 * (torch.arange(40) % 5), wide_logits(40, 200)
    trajectory = TrainingDynamics(40, 200)
    trajectory.observe(index, logits, label)
    trajectory.merge(0, no_reduce)
    assert trajectory.phases(index) == []
    trajectory.observe(index, logits, label)
    trajectory.merge(1, no_reduce)
    (found,) = trajectory.phases(index)
    occurring = logits[:, ::30][:, :5]
    expected = occurring - occurring.mean(dim=1, keepdim=True)
    torch.testing.assert_close((found @ trajectory.basis.T)[:, ::30][:, :5], expected, atol=1e-5, rtol=1e-5)
    # What does not lie in the coordinates of classes was kept of both epochs.
    torch.testing.assert_close(trajectory.scores(index)["margin"], label_margin(logits, label))
    again = TrainingDynamics.from_state_dict(trajectory.state_dict())
    assert again.basis.equal(trajectory.basis)
    assert again.phases(index)[0].equal(found)


def test_the_ranks_take_the_classes_of_all_of_them():
    logits, label = wide_logits(40, 200), 30 * (torch.arange(40) % 5)

    def observed(rank, reduce):
        index = torch.arange(40)[label == 30 * rank] if rank < 3 else torch.arange(40)[label >= 90]
        trajectory = TrainingDynamics(40, 200)
        trajectory.observe(index, logits[index], label[index])
        trajectory.merge(0, reduce)
        return trajectory.basis

    bases = run_ranks(observed, 4)
    assert all(basis.equal(bases[0]) for basis in bases)
    assert bases[0].abs().amax(dim=1).nonzero().flatten().tolist() == [0, 30, 60, 90, 120]


def test_the_last_pass_leaves_open_which_classes_occur():
    trajectory, logits = TrainingDynamics(200, 200), wide_logits(200, 200)
    trajectory.observe(torch.arange(200), logits, torch.arange(200) % 5)
    trajectory.merge(None, no_reduce)  # its rows are as those before
    assert trajectory.has_margins
    assert not trajectory.knows_classes
    assert not trajectory.is_empty


def many(total=600, outputs=400, occurring=150, *, seed=3, **arguments):
    """Logits of more outputs than have coordinates, labels of some of them, and what takes them."""
    label = 2 * (torch.arange(total) % occurring)
    return torch.arange(total), wide_logits(total, outputs, seed), label, TrainingDynamics(total, outputs, **arguments)


def test_of_more_classes_than_coordinates_the_soft_margins_are_averaged():
    index, logits, label, trajectory = many(occurring=200)
    for phase, factor in ((0, 1.0), (0, 2.0), (2, 3.0)):
        for rows in index.split(70):
            trajectory.observe(rows, factor * logits[rows], label[rows])
        trajectory.merge(phase, no_reduce)
    assert trajectory.basis.shape == (400, 0)
    assert trajectory.num_rivals == 200
    first, third = trajectory.soft_margins(index)
    occurring = torch.arange(0, 400, 2)
    # Half of the outputs occur: the first epoch, in which all were compared, counts too.
    expected = [soft_margins(logits, label), soft_margins(2 * logits, label, rivals=occurring)]
    torch.testing.assert_close(first, torch.stack(expected).mean(dim=0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(third, soft_margins(3 * logits, label, rivals=occurring), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(trajectory.scores(index)["margin"], 2 * label_margin(logits, label))
    assert [phase.shape[1] for phase in trajectory.phases(index)] == [0, 0]


def test_where_most_outputs_are_named_by_no_label_the_first_epoch_is_not_kept():
    index, logits, label, trajectory = many()
    trajectory.observe(index, logits, label)
    trajectory.merge(0, no_reduce)
    assert trajectory.soft_margins(index) == []
    trajectory.observe(index, logits, label)
    trajectory.merge(1, no_reduce)
    (found,) = trajectory.soft_margins(index)
    torch.testing.assert_close(found, soft_margins(logits, label, rivals=torch.arange(0, 300, 2)), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(trajectory.scores(index)["margin"], label_margin(logits, label))
    last = trajectory.of_last_pass(logits, label)
    torch.testing.assert_close(last["soft_margins"], found)
    assert last["last"].shape == (600, 0)
    assert set(last["runner_up"].tolist()) <= set(range(0, 300, 2))


def test_a_class_that_is_first_named_later_is_compared_from_then_on():
    index, logits, label, trajectory = many(occurring=200)
    seen = index[label < 300]
    trajectory.observe(seen, logits[seen], label[seen])
    trajectory.merge(0, no_reduce)
    assert trajectory.num_rivals == 150
    trajectory.observe(index, logits, label)
    trajectory.merge(1, no_reduce)
    assert trajectory.num_rivals == 200
    assert trajectory.soft_margins(index)[-1].isfinite().all()


def test_what_is_fresh_of_many_classes_and_how_often_each_was_expected():
    index, logits, label, trajectory = many()
    trajectory.observe(index[:400], logits[:400], label[:400])
    found, count = trajectory.fresh(index)
    torch.testing.assert_close(found[:400], soft_margins(logits[:400], label[:400]))
    assert found[400:].isnan().all()
    assert count.tolist() == [1] * 400 + [0] * 200
    torch.testing.assert_close(trajectory.expected(no_reduce).float(), logits[:400].softmax(1).sum(0))
    broken = logits[400:410].clone()
    broken[0, 0] = torch.nan
    trajectory.observe(index[400:410], broken, label[400:410])
    assert trajectory.rows_left_out == 1
    assert trajectory.expected(no_reduce).isfinite().all()
    trajectory.merge(0, no_reduce)
    assert not trajectory.expected(no_reduce).any()


@pytest.mark.parametrize("keeps", [False, True])
def test_the_state_of_many_classes_goes_into_a_checkpoint_and_back(keeps):
    index, logits, label, trajectory = many(occurring=200, keeps_coordinates=keeps)
    for phase in (0, 1):
        trajectory.observe(index, logits, label)
        trajectory.merge(phase, no_reduce)
    again = TrainingDynamics.from_state_dict(saved_and_loaded(trajectory.state_dict()))
    for each in (trajectory, again):
        each.observe(index, 2 * logits, label)
        each.merge(3, no_reduce)
    assert again.num_rivals == 200
    assert again.basis.equal(trajectory.basis)
    for one, other in zip(again.soft_margins(index), trajectory.soft_margins(index), strict=True):
        assert one.equal(other)
    for one, other in zip(again.phases(index), trajectory.phases(index), strict=True):
        assert one.equal(other)


def test_a_recipe_that_looks_at_attributions_has_random_coordinates_too():
    index, logits, label, trajectory = many(occurring=200, keeps_coordinates=True)
    trajectory.observe(index, logits, label)
    trajectory.merge(0, no_reduce)
    assert trajectory.basis.equal(class_coordinates(400))
    torch.testing.assert_close(trajectory.phases(index)[0], logits @ trajectory.basis)
    torch.testing.assert_close(trajectory.soft_margins(index)[0], soft_margins(logits, label), atol=1e-4, rtol=1e-5)


def test_evidence_of_a_version_that_kept_random_coordinates_is_refused():
    state = TrainingDynamics(30, 200).state_dict()
    state["phases"] = torch.zeros(PHASES, 30, MAX_COORDINATES + 1)
    with pytest.raises(
        ValueError, match=r"separates 200 classes, but it was written by a version .* start the fit again"
    ):
        TrainingDynamics.from_state_dict(state)
