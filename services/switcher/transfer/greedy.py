"""How OServe chooses sources, as a comparator.

After third parties' reading notes of OServe (arXiv 2602.12151, ad hoc model switching; its text
could not be read): for each shard that a GPU needs, among the GPUs that hold it take the one that
has least to send so far, one in the same node before one in another, and add the shard's bytes to
what it sends. A shard is a sheet's part of one layer here. What the receiving side and the
network between nodes have to bear is not looked at, nor is a shard divided.
"""

from collections import defaultdict
from collections.abc import Sequence

from services.switcher.transfer.links import Network
from services.switcher.transfer.planner import plan_with
from services.switcher.transfer.problem import TransferPlan, TransferProblem
from services.switcher.transfer.rounding import Cut
from services.switcher.transfer.wants import Piece, Want, options
from shared.placement.sheets import Area


def greedy_transfer(problem: TransferProblem) -> TransferPlan:
    """As plan_transfer; its ``seconds_bound`` is 0: it knows none."""
    return plan_with(problem, _least_loaded)


def _least_loaded(wants: Sequence[Want], network: Network) -> tuple[list[list[Cut]], float]:
    sent: defaultdict[str, int] = defaultdict(int)
    found: list[list[Cut]] = []
    for want in wants:
        cuts: list[Cut] = []
        for piece in want.pieces:
            for layer in range(*piece.area.layers):
                shard = Piece(
                    piece.sheet, Area((layer, layer + 1), piece.area.units), piece.cell_bytes
                )
                holder = min(
                    options(want),
                    key=lambda h: (network.remote(h[0], want.gpu), sent[h[0]], h),
                )
                sent[holder[0]] += shard.bytes if holder[0] != want.gpu else 0
                cuts.append((holder, shard))
        found.append(cuts)
    return found, 0.0
