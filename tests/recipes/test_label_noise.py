from dataclasses import replace

import pytest
import torch

from lightning_unlearn.functional.prequential import following, prequential_rate
from lightning_unlearn.functional.suspects import longest_list
from lightning_unlearn.recipes import explanations, label_evidence, label_noise
from lightning_unlearn.recipes.label_evidence import LabelHistory
from lightning_unlearn.recipes.label_noise import find_label_noise
from lightning_unlearn.recipes.latent_noise import transition_noise
from lightning_unlearn.utilities.reduce import no_reduce
from tests.ranks import run_ranks

CLASSES = 6


def history(n, names, *, seed=0, memorized=0.0, weights=None, gap=0.1):
    """Gaussian classes that a network has learned, four phases, and a last pass that may repeat the given labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % CLASSES
    center = 3.2 * torch.eye(CLASSES)
    said = 1.5 * (center[truth] + torch.randn(n, CLASSES, generator=generator))
    label = torch.multinomial(names[truth], 1, generator=generator).squeeze(1)
    # A network that has learned habits says so.
    said = (said.softmax(1) @ names.float()).clamp(min=1e-4).log() if (names > 0.05).sum() > CLASSES else said
    said = said - (0 if weights is None else weights)
    given = torch.nn.functional.one_hot(label, CLASSES).float()
    phases = [said + 0.3 * torch.randn(n, CLASSES, generator=generator) + memorized * k * given for k in range(4)]
    position = torch.rand(n, generator=generator)
    early = prequential_rate(phases[0], label, position, torch.ones(n))
    last = phases[3] + memorized * given
    return LabelHistory(torch.stack(phases, 1), last, label, torch.ones(n), early, gap), label != truth


def suspects(found, precision=0.85):
    """(n,) bool, those that are named or acted upon."""
    listed, _ = longest_list(found.wrong, torch.ones(len(found.wrong)), precision)
    return listed & (found.status in {"found", "weak"})


def expected(found):
    """Their expected precision."""
    return found.wrong[suspects(found)].mean().item()


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def blind(rate):
    return (1 - rate) * torch.eye(CLASSES) + rate / CLASSES


def next_class(rate):
    return (1 - rate) * torch.eye(CLASSES) + rate * torch.eye(CLASSES).roll(1, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("memorized", [0.0, 2.0])
def test_clean_data_has_no_suspects(seed, memorized):
    found = find_label_noise(history(3000, blind(0.0), seed=seed, memorized=memorized)[0])
    assert found.status in {"none", "weak"}
    assert suspects(found).double().mean() <= 0.003
    assert found.interval == (0, 1)
    assert found.structured is None


@pytest.mark.parametrize("rate", [0.02, 0.06, 0.3])
@pytest.mark.parametrize("memorized", [0.0, 1.0])
def test_blind_errors_are_found_at_the_precision_that_is_stated(rate, memorized):
    seen, wrong = history(6000, blind(rate), memorized=memorized)
    found = find_label_noise(seen)
    true_rate = wrong.double().mean().item()
    assert found.status == "found"
    assert found.interval[0] <= true_rate <= found.interval[1] < 1
    assert wrong[suspects(found)].double().mean().item() >= expected(found) - 0.1
    assert (wrong & suspects(found)).sum() >= 0.5 * wrong.sum()
    assert found.structured is None


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_habits_are_found(rate):
    seen, wrong = history(6000, next_class(rate))
    found = find_label_noise(seen)
    assert found.structured is not None
    assert found.status == "found"
    assert wrong[suspects(found)].double().mean() >= 0.75
    assert (wrong & suspects(found)).sum() >= 0.6 * wrong.sum()
    assert found.suggested[suspects(found)].eq((torch.arange(6000) % CLASSES)[suspects(found)]).double().mean() > 0.7
    assert found.interval[0] <= wrong.double().mean().item() <= found.interval[1]


def swapped(one, other, rate):
    names = torch.eye(CLASSES)
    names[[one, other], [one, other]] = 1 - rate
    names[[one, other], [other, one]] = rate
    return names


def test_two_classes_that_go_by_each_others_names_are_found():
    seen, wrong = history(4000, swapped(0, 1, 0.3))
    found = find_label_noise(seen)
    assert found.transition[:2, :2].flatten().tolist() == pytest.approx([0.7, 0.3, 0.3, 0.7], abs=0.07)
    assert found.transition.diagonal()[2:].min() > 0.98
    assert found.rate == pytest.approx(wrong.double().mean().item(), abs=0.02)
    listed = suspects(found)
    assert wrong[listed].double().mean() > expected(found) - 0.1
    assert listed[wrong].double().mean() > 0.5


@pytest.mark.parametrize("distance", [0.5, 1.0, 1.5])
def test_two_clean_classes_that_overlap_go_by_no_other_name(distance):
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4000) % CLASSES
    center = 3.2 * torch.eye(CLASSES)
    center[1] = center[0] + distance * torch.eye(CLASSES)[1]
    x = center[truth] + torch.randn(4000, CLASSES, generator=generator)
    said = x @ center.T - center.square().sum(1) / 2
    phases = [said + 0.3 * torch.randn(4000, CLASSES, generator=generator) for _ in range(4)]
    early = prequential_rate(phases[0], truth, torch.rand(4000, generator=generator), torch.ones(4000))
    found = find_label_noise(LabelHistory(torch.stack(phases, 1), phases[3], truth, torch.ones(4000), early, 0.0))
    assert found.structured is None
    assert suspects(found).double().mean() <= 0.003


def slow_to_learn(seen):
    """Of class 3 a third is taken for class 0, surely at first, hardly any more in the end."""
    taken = (seen.label == 3) & (torch.rand(len(seen.label), generator=generator_of(1)) < 1 / 3)
    phases, lead = seen.phases.clone(), seen.phases.new_zeros(4, CLASSES)
    lead[:, 0] = torch.tensor([9.0, 5.0, 1.0, 0.0])
    phases[taken] += lead
    last = seen.last.clone()
    return replace(seen, phases=phases, last=last), taken


@pytest.mark.parametrize("gap", [0.1, None])
def test_a_class_that_is_learned_late_goes_by_no_other_name(gap, monkeypatch):
    seen, taken = slow_to_learn(history(6000, blind(0.0), gap=gap)[0])
    # The first part of training alone would show it.
    monkeypatch.setattr(label_noise, "_is_habit", lambda *_: True)
    assert find_label_noise(seen).structured is not None
    monkeypatch.undo()
    # Not all labels are predicted.
    unsure = torch.rand(6000, generator=generator_of(2)) < 0.2
    last = torch.where(unsure.unsqueeze(1), seen.last.roll(1, 1), seen.last)
    found = find_label_noise(replace(seen, last=last))
    assert found.structured is None
    assert suspects(found)[taken].double().mean() <= 0.01


def test_a_habit_is_not_asked_of_all_training_where_labels_are_memorized():
    seen, _ = history(6000, next_class(0.15), memorized=4.0, gap=0.3)
    assert (seen.last.argmax(1) == seen.label).double().mean() > 0.95
    assert find_label_noise(seen).structured is not None


def test_more_precision_is_a_shorter_list_of_the_same_order():
    seen, _ = history(6000, blind(0.2))
    found = find_label_noise(seen)
    few, many = (suspects(found, precision) for precision in (0.97, 0.6))
    assert few.sum() < many.sum()
    assert not (few & ~many).any()


def test_class_weights_change_little():
    plain, wrong = history(6000, blind(0.06))
    weighted, _ = history(6000, blind(0.06), weights=torch.tensor([0.0, 2.0, 4.0, 6.0, 0.0, 0.0]))
    a, b = find_label_noise(plain), find_label_noise(weighted)
    right = [wrong[found.wrong.argsort(descending=True)[:300]].double().mean() for found in (a, b)]
    assert right[1] >= right[0] - 0.1
    assert (a.status, b.status) == ("found", "found")
    assert wrong[suspects(b)].double().mean() >= expected(b) - 0.1
    assert (wrong & suspects(b)).sum() >= 0.5 * wrong.sum()


def test_suspects_of_a_sampler_that_prefers_classes_are_not_acted_upon():
    favored = torch.tensor([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0])
    seen, wrong = history(6000, blind(0.06), weights=-favored)
    found = find_label_noise(replace(seen, early=replace(seen.early, bias=0 * favored.double()), favored=favored))
    assert found.status == "weak"
    assert found.interval[1] == 1
    assert wrong[suspects(found)].double().mean() >= expected(found) - 0.1


def test_what_the_next_epoch_does_not_confirm_is_not_believed():
    seen, _ = history(6000, blind(0.0))
    early = replace(seen.early, low=0.02, middle=0.05, z_score=9.0)
    before = find_label_noise(replace(seen, early=early))
    assert before.rate == 0.02
    after = find_label_noise(replace(seen, early=following(early, seen.early)))
    assert after.status == "none"
    assert suspects(after).sum() == 0


def test_a_network_that_says_one_class_tells_nothing():
    seen, _ = history(2000, blind(0.1))
    dead = torch.zeros_like(seen.last)
    dead[:, 0] = 1
    found = find_label_noise(replace(seen, phases=dead.unsqueeze(1).repeat(1, 4, 1), last=dead, early=None))
    assert found.status == "unknown"
    assert not suspects(found).any()


def test_without_an_early_epoch_the_rate_has_no_upper_end():
    seen, wrong = history(4000, blind(0.1))
    found = find_label_noise(replace(seen, early=None))
    assert found.interval[1] == 1.0
    assert found.interval[0] <= wrong.double().mean().item()
    assert found.status == "found"


def test_leave_one_out_scores_tell_the_rate_where_all_is_memorized():
    seen, wrong = history(4000, blind(0.1), memorized=6.0)
    clean_view = seen.phases[:, 0]  # as said before the labels were learned
    told = prequential_rate(clean_view, seen.label, torch.zeros(4000), torch.ones(4000), parts=1)
    blindly = find_label_noise(replace(seen, early=None))
    found = find_label_noise(replace(seen, early=None, left_out=told))
    assert suspects(blindly).sum() < 10
    assert found.interval[0] <= wrong.double().mean().item() <= found.interval[1]
    assert (wrong & suspects(found)).sum() > 0.3 * wrong.sum()
    assert wrong[suspects(found)].double().mean() > 0.75


def with_left_out(seen, skill):
    """What the network said at first in place of leave-one-out logits, known to be better than an early epoch."""
    ones = torch.ones(len(seen.label))
    told = prequential_rate(seen.phases[:, 0], seen.label, torch.zeros_like(ones), ones, parts=1)
    early = replace(seen.early, skill=told.skill - skill, is_settled=True)
    return replace(seen, early=early, left_out=told, left_out_logits=seen.phases[:, 0])


def test_leave_one_out_scores_rank_where_they_know_more():
    seen, wrong = history(4000, blind(0.1))
    noise = 8 * torch.randn(seen.phases.shape, generator=torch.Generator().manual_seed(1))
    kept, added = (
        find_label_noise(replace(with_left_out(seen, skill), phases=seen.phases + noise)).wrong for skill in (0.0, 0.2)
    )
    precision = [wrong[order.argsort(descending=True)[:300]].double().mean() for order in (kept, added)]
    assert precision[1] > precision[0] + 0.03
    without = replace(with_left_out(seen, 0.2), phases=seen.phases + noise, left_out_logits=None)
    torch.testing.assert_close(find_label_noise(without).wrong, kept)


def test_two_ranks_rank_by_leave_one_out_scores_as_one_does():
    seen = with_left_out(history(1501, blind(0.1), memorized=2.0)[0], 0.2)
    one = find_label_noise(seen)

    def on_rank(rank, reduce):
        rows = slice(rank, None, 2)
        of_rank = {name: getattr(seen, name)[rows] for name in ("phases", "last", "label", "weight", "left_out_logits")}
        return find_label_noise(replace(seen, **of_rank), reduce=reduce)

    for rank, found in enumerate(run_ranks(on_rank, 2)):
        torch.testing.assert_close(found.wrong, one.wrong[rank::2], atol=1e-3, rtol=1e-2)


def test_samples_that_a_phase_has_not_seen_are_judged_by_the_others():
    seen, wrong = history(4000, blind(0.1))
    phases = seen.phases.clone()
    phases[::3, 1] = torch.nan
    phases[5] = torch.nan
    found = find_label_noise(replace(seen, phases=phases))
    assert found.wrong.isfinite().all()
    assert wrong[suspects(found)].double().mean() > 0.75


def test_the_second_half_of_training_and_the_last_pass_count_where_nothing_is_memorized():
    seen, _ = history(2000, blind(0.1))
    other = replace(seen, last=torch.randn_like(seen.last))
    near, half, far = (label_evidence._evidence(replace(other, gap=gap))[1] for gap in (0.0, 0.125, 0.3))
    late = other.phases[:, other.phases.shape[1] // 2 :].mean(dim=1)
    torch.testing.assert_close(near, (late + other.last) / 2)
    assert torch.equal(far, other.phases.mean(dim=1))
    assert torch.equal(far, label_evidence._evidence(replace(other, gap=None))[1])
    torch.testing.assert_close(half, (near + far) / 2)


def test_a_class_that_loses_its_labels_to_any_other_is_found():
    shares = torch.tensor([0.0, 0.0, 0.28, 0.0, 0.0, 0.0]).unsqueeze(1)
    seen, wrong = history(6000, (1 - shares) * torch.eye(CLASSES) + shares / CLASSES)
    found = find_label_noise(seen)
    assert found.status == "found"
    assert found.transition.diagonal()[2] < 0.85 < found.transition.diagonal()[[0, 1, 3, 4, 5]].min()
    assert wrong[suspects(found)].double().mean().item() >= expected(found) - 0.1
    assert (wrong & suspects(found)).sum() >= 0.5 * wrong.sum()
    assert found.interval[0] <= wrong.double().mean().item() <= found.interval[1]


def test_what_knows_far_less_of_the_classes_than_leave_one_out_scores_is_not_asked():
    seen = with_left_out(history(1500, blind(0.0))[0], 0.2)
    early = replace(seen.early, low=0.03, middle=0.07, high=0.1, z_score=15.0, is_settled=True, is_confirmed=True)
    assert seen.left_out.skill > 0.6
    little = label_evidence._unseen(replace(seen, early=replace(early, skill=0.2)), 0.0, no_reduce)
    assert little.middle == pytest.approx(seen.left_out.middle, abs=0.01)
    assert little.z_score == seen.left_out.z_score
    much = label_evidence._unseen(replace(seen, early=replace(early, skill=0.8)), 0.0, no_reduce)
    assert much.z_score == 15.0


def test_latent_classes_that_are_too_sure_of_overlapping_ones_show_no_wrong_labels(monkeypatch):
    seen, _ = history(3000, blind(0.0))
    seen = replace(seen, early=None, gap=0.0)  # nothing but latent classes is asked then, and nothing is memorized
    monkeypatch.setattr(label_noise, "transition_noise", lambda *given: _far_too_sure(transition_noise(*given)))
    found = find_label_noise(seen)
    assert found.transition is None
    assert not suspects(found).any()
    wrong = history(3000, blind(0.2))[1]
    found = find_label_noise(replace(history(3000, blind(0.2))[0], early=None))
    assert found.transition is not None
    assert found.rate == pytest.approx(wrong.double().mean().item(), abs=0.04)
    assert wrong[suspects(found)].double().mean() > 0.75


def _far_too_sure(noise):
    window = replace(noise.window, likelihood=10 * noise.window.likelihood)
    return replace(noise, window=window, uncertainty=0.01, confident=0.05, rate=0.1)


def test_copies_that_share_a_weight_count_once():
    seen, _ = history(1500, blind(0.1))
    repeat = torch.cat([torch.arange(1500), torch.arange(1500)])
    twice = LabelHistory(
        seen.phases[repeat], seen.last[repeat], seen.label[repeat], torch.full((3000,), 0.5), seen.early, seen.gap
    )
    one, both = find_label_noise(seen), find_label_noise(twice)
    torch.testing.assert_close(both.wrong[:1500], one.wrong, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("names", [blind(0.1), next_class(0.3)])
def test_two_ranks_find_what_one_finds(names):
    seen, _ = history(1501, names)
    one = find_label_noise(seen)

    def on_rank(rank, reduce):
        rows = slice(rank, None, 2)
        part = replace(
            seen, phases=seen.phases[rows], last=seen.last[rows], label=seen.label[rows], weight=seen.weight[rows]
        )
        return find_label_noise(part, reduce=reduce)

    for rank, found in enumerate(run_ranks(on_rank, 2)):
        torch.testing.assert_close(found.wrong, one.wrong[rank::2], atol=1e-3, rtol=1e-2)
        assert found.status == one.status


def test_errors_on_classes_that_are_taken_for_each_other_are_added_to_blind_ones(monkeypatch):
    monkeypatch.setattr(explanations, "_CLEAR_CUT", 0.0)  # as where classes are hard to tell
    seen, _ = history(6000, blind(0.1))
    seen = replace(seen, early=replace(seen.early, is_confirmed=True))
    more = replace(seen, early=replace(seen.early, confused=0.05, most_confused=0.08, is_blind=False))
    few, many = (explanations.by_blind_errors(label_evidence.label_evidence(one, no_reduce)[0]) for one in (seen, more))
    assert many.rate == pytest.approx(few.rate + 0.05)
    assert many.interval == (few.interval[0], 1)
    assert many.wrong.mean().item() == pytest.approx(many.rate, abs=0.005)


@pytest.mark.parametrize(("confused", "counted"), [(0.0, 0.0), (0.02, 0.0), (0.03, 0.015), (0.04, 0.04), (0.2, 0.2)])
def test_little_confusion_is_of_classes_that_overlap(confused, counted):
    assert explanations._counted(confused) == pytest.approx(counted)


def test_where_scores_split_in_two_they_tell_how_many_labels_are_wrong():
    seen, wrong = history(6000, blind(0.02))
    too_many = replace(seen.early, low=0.0, middle=0.05, high=0.07, confused=0.05, is_confirmed=True)
    found = find_label_noise(replace(seen, early=too_many))
    assert found.rate == pytest.approx(wrong.double().mean().item(), abs=0.006)
    assert wrong[suspects(found)].double().mean() > expected(found) - 0.1


def test_the_upper_end_holds_all_confusion_that_may_be_errors():
    seen, _ = history(6000, blind(0.1))
    found = find_label_noise(replace(seen, early=replace(seen.early, most_confused=0.08)))
    assert found.interval[1] == pytest.approx(seen.early.middle + 0.08)
    weighted = replace(seen.early, bias=torch.linspace(-1, 1, CLASSES).double())
    for early in (replace(seen.early, is_blind=False), weighted):
        assert find_label_noise(replace(seen, early=early)).interval[1] == 1


def test_what_no_other_epoch_confirms_is_not_believed_beside_leave_one_out_scores():
    seen, _ = history(6000, blind(0.1))
    early = replace(seen.early, middle=0.2, confused=0.1, is_confirmed=False)
    both = replace(seen, early=early, left_out=seen.early)
    told = label_evidence._unseen(both, 0.0, no_reduce)
    assert (told.middle, told.confused, told.is_confirmed) == (seen.early.middle, 0, True)


@pytest.mark.parametrize("early", [True, False])
def test_few_samples_are_judged_by_latent_classes(early):
    seen, wrong = history(150, blind(0.2))
    found = find_label_noise(seen if early else replace(seen, early=None))
    assert found.status == "found"
    assert found.transition is not None
    assert found.rate == pytest.approx(wrong.double().mean().item(), abs=0.08)
    assert wrong[suspects(found)].double().mean() >= 0.8
    assert (wrong & suspects(found)).sum() >= 0.7 * wrong.sum()
    assert find_label_noise(history(150, blind(0.0))[0]).status == "none"


def test_what_was_memorized_is_judged_at_the_rate_of_the_early_epoch():
    seen, wrong = history(6000, blind(0.2), memorized=1.5)
    evidence, _ = label_evidence.label_evidence(replace(seen, early=replace(seen.early, is_confirmed=True)), no_reduce)
    found = explanations.by_blind_errors(evidence)
    assert evidence.fit.rate < 0.1
    assert found.rate == pytest.approx(wrong.double().mean().item(), abs=0.03)
    assert found.wrong.mean().item() == pytest.approx(found.rate, abs=0.01)
    assert found.wrong[wrong].mean() > 0.7


def test_two_classes_of_which_one_is_rare_are_judged_by_the_scores():
    n, generator = 4000, generator_of(1)
    truth = (torch.rand(n, generator=generator) < 0.05).long()
    is_hard = torch.rand(n, generator=generator) < 0.15
    margin = torch.where(truth == 1, 3.0, -3.0) * torch.where(is_hard, 0.3, 1.0) - 1.5
    margin += torch.randn(n, generator=generator) * torch.where(truth == 1, 2.5, 0.8)
    label = torch.where(torch.rand(n, generator=generator) < 0.03, 1 - truth, truth)
    said = torch.stack([-margin / 2, margin / 2], 1)
    phases = [said * (0.6 + 0.15 * k) + 0.2 * torch.randn(n, 2, generator=generator) for k in range(4)]
    ones, position = torch.ones(n), torch.rand(n, generator=generator)
    early = replace(prequential_rate(phases[0], label, position, ones), is_confirmed=True)
    found = find_label_noise(LabelHistory(torch.stack(phases, 1), phases[3], label, ones, early))
    assert found.status == "found"
    assert (label != truth)[suspects(found)].double().mean() >= expected(found) - 0.1
    assert suspects(found).sum() >= 100


def test_a_network_that_predicts_few_labels_early_is_believed_less():
    seen, _ = history(6000, blind(0.05))
    early = replace(seen.early, low=0.01, middle=0.09, is_confirmed=True, confused=0.0)
    rates = [
        find_label_noise(replace(seen, early=replace(early, skill=skill))).rate for skill in (0.1, 0.2, 0.3, 0.5, 0.8)
    ]
    # What it cannot tell is left to the scores, of which the lower end counts.
    fit = label_evidence.label_evidence(seen, no_reduce)[0].fit
    assert rates[0] == pytest.approx(fit.rate - 1.96 * fit.std_error)
    assert rates == sorted(rates)
    assert rates[-2:] == pytest.approx([rates[-1]] * 2)


@pytest.mark.parametrize(("skill", "counted"), [(0.1, 0.0), (0.5, 0.2), (0.8, 0.2)])
def test_confusion_of_a_network_that_has_hardly_learned_is_not_counted(skill, counted):
    seen, _ = history(6000, blind(0.05))
    early = replace(seen.early, skill=skill, is_confirmed=True, confused=0.2)
    found = label_evidence.label_evidence(replace(seen, early=early), no_reduce)[0]
    assert found.early.confused == pytest.approx(counted)


def test_a_few_rare_classes_that_are_not_learned_do_not_keep_the_others_from_being_judged():
    seen, _ = history(6000, blind(0.1))
    rare = (seen.label > 1) & (torch.arange(6000) % 12 > 0)
    kept = replace(seen, **{name: getattr(seen, name)[~rare] for name in ("phases", "last", "label", "weight")})
    never = torch.tensor([0.0, 0, -50, -50, -50, -50])
    kept = replace(kept, phases=kept.phases + never, last=kept.last + never)
    found = find_label_noise(kept)
    assert found.objection == ""
    assert not suspects(found)[kept.label > 1].any()
    assert find_label_noise(replace(seen, phases=seen.phases + never, last=seen.last + never)).objection != ""
