"""The parallel layout: how many processes, and what each one is.

The arithmetic stands here and nowhere else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """``world`` processes as dp data-parallel groups of tp x pp processes each.

    Ranks are laid out as Colossal-AI's hybrid_parallel does: dp outermost, then pp, then tp, so that the
    processes of one tensor-parallel group are neighbours.
    """

    world: int
    tp: int = 1
    pp: int = 1
    rank: int = 0

    @property
    def dp(self) -> int:
        """Number of data-parallel groups: each sees other images."""
        return self.world // (self.tp * self.pp)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.tp % self.pp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp * self.pp)

    @property
    def is_reporter(self) -> bool:
        """One process of each data-parallel group holds the outputs and speaks for the group in sums."""
        return self.tp_rank == 0 and self.pp_rank == self.pp - 1

    def problems(self) -> list[str]:
        """What makes this layout impossible, each with its mend; empty when it is possible."""
        if self.world % (self.tp * self.pp):
            return [
                f"--tp_size {self.tp} x --pp_size {self.pp} = {self.tp * self.pp} does not divide the "
                f"{self.world} "
                f"process(es): set GPUNUM to a multiple of {self.tp * self.pp}, or lower TP_SIZE or PP_SIZE"
            ]
        return []

    def __str__(self) -> str:
        return f"{self.world} process{'es' * (self.world > 1)} = dp {self.dp} x tp {self.tp} x pp {self.pp}"
