"""What is known of the pruning of a fit, and kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.pruning.masking import PrunedEntries
from lightning_unlearn.pruning.ranking import Ranking
from lightning_unlearn.pruning.sites import PruneSite
from lightning_unlearn.results.mask import NeuronMask
from lightning_unlearn.results.provenance import copied


@dataclass(frozen=True, eq=False)
class PruneState:
    """Layers, masks and what is said of them; replaced as a whole when a partition is acted on.

    Args:
        sites: the layers, in the order in which ``forward`` calls them.
        masks: of each layer, once there are any.
        live: of each layer, how many neurons were live when it was first pruned: what ``amount`` is a share of.
        epoch: of the partition that was acted on last; -1 before the first.
        is_proposal: whether the masks say what would be pruned, in a dry run, and nothing is.
        note: what the guard found.
    """

    sites: Sequence[PruneSite] = ()
    masks: Sequence[NeuronMask] = ()
    live: Sequence[int] = ()
    epoch: int = -1
    is_proposal: bool = False
    note: str = field(default="")

    @property
    def holds(self) -> bool:
        """Whether masks have been acted on, and not only proposed."""
        return bool(self.masks) and not self.is_proposal

    @property
    def count(self) -> int:
        """How many neurons the masks leave out."""
        return sum(len(mask.pruned_indices()) for mask in self.masks)

    def pruned_before(self, at: int) -> Tensor | None:
        """Return (D,) bool, the neurons of a layer that have been pruned; None where none could be."""
        return ~self.masks[at].keep if self.holds else None

    def entries(self, model: nn.Module) -> list[PrunedEntries]:
        """Return what belongs to pruned neurons in a module.

        Raises:
            ValueError: where a layer has another number of neurons than its mask.
        """
        for site, mask in zip(self.sites, self.masks, strict=True):
            if (width := site.width(model)) != len(mask.keep):
                raise ValueError(
                    f"Expected layer '{site.target}', in which SensitivityPruneCallback has pruned neurons, to keep"
                    f" its {len(mask.keep)} neurons until the end of the fit, but it now has {width}. Replace layers"
                    " before or after the fit."
                )
        pairs = zip(self.sites, self.masks, strict=True)
        return [entry for site, mask in pairs for entry in site.entries(model, mask.pruned_indices())]

    def mask_of(self, at: int, site: PruneSite, ranking: Ranking, pruned: Tensor) -> NeuronMask:
        """Return the mask with what was pruned before; of that, the score is the one that it was pruned for."""
        keep = torch.ones(len(ranking.score), dtype=torch.bool)
        score, error = ranking.score, ranking.standard_error
        if self.holds:
            before = self.masks[at]
            keep = before.keep.clone()
            score = torch.where(keep, score, before.sensitivity)
            if error is not None and before.standard_error is not None:
                error = torch.where(keep, error, before.standard_error)
        keep[pruned] = False
        return NeuronMask(site.target, keep, score, error)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and primitives, 9 bytes per neuron."""
        return {
            "epoch": self.epoch,
            "is_proposal": self.is_proposal,
            "note": self.note,
            "sites": [asdict(site) for site in self.sites],
            "live": list(self.live),
            "masks": [
                {
                    "layer": mask.layer,
                    "keep": copied(mask.keep),
                    "sensitivity": copied(mask.sensitivity),
                    "standard_error": copied(mask.standard_error),
                }
                for mask in self.masks
            ],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PruneState:
        """Return what :meth:`state_dict` has given."""
        return cls(
            sites=[PruneSite(**site) for site in state["sites"]],
            masks=[NeuronMask(**copied(mask)) for mask in state["masks"]],
            live=list(state["live"]),
            epoch=state["epoch"],
            is_proposal=state["is_proposal"],
            note=state["note"],
        )
