"""What routers make of a plan: they do not know the output length of a request when it comes.

A router goes by the input length: it holds a request for each type i of its model with a chance

    p[i](x) ~ share[i] exp(-(x - c[i])^2 / (2 s^2)),  sum over i is 1

where x = ln(1 + input tokens), c[i] is the type's centre, s the spread within a type, and the
shares are those of the requests. A chance of ``CERTAIN`` or more is taken for certainty; otherwise
the type's rows of weights are mixed by the chances above ``NEGLIGIBLE``. So what a request of true
type j meets on average is rows in the proportions

    C[j, i] = E[ p[i](x) as the router rounds it ],  x normal around c[j] with spread s

and a plan that separates types by their outputs only is not carried out. It is carried out exactly
if it is made for *believed* types. With d[j] the arrivals of true types, and n[k, j] what one
replica of column k serves of type j alone,

    d'[i] = sum_j d[j] C[j, i]           arrivals that are believed to be of type i
    1 / n'[k, i] = sum_j w[j, i] / n[k, j]    with w[j, i] = d[j] C[j, i] / d'[i]
    z[k, j] = sum_i z'[k, i] C[j, i]          shares of true types under shares z' of believed ones

a column's time is the same in both: sum_i d'[i] z'[k, i] / n'[k, i] = sum_j d[j] z[k, j] / n[k, j].
If z' sums to t for each believed type, z does for each true one, so headroom is the same as well.

Where a column cannot serve some true type (n = 0: not within the target that others meet, or not
at all), it serves a believed type if that is ``PART_MIN`` of it at most; that part takes as long as
the slowest of the others, and is late. A believed type of which that leaves no column is served by
those that can serve most of it: routers cannot tell its parts apart.

Not counted: limits on the output that clients set, and tenants' own habits, by which routers tell
more than this; and that inputs within a type may spread more or less than s. A centre is taken as
ln(1 + mean input): the mean of a log-normal length lies above its median by the same factor for all
types, and only differences between centres matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from services.scheduler.policies.capacity import Table
from services.scheduler.policies.capacity_types import CLASS_SHARE_MIN, TypeDemand, strictest
from services.scheduler.policies.flow import Array

SPREAD_LN = 0.7  # router.length_spread_ln
CERTAIN = 0.95  # services/router/routes.py
NEGLIGIBLE = 0.01  # likewise
SHARE_MIN = 1e-3  # services/router/request_types.py: no type is ever impossible
PART_MIN = 0.05  # of a believed type: the most that a column may be unable to serve
ROUNDING = 1e-9
DRAWS = 200  # input lengths for each type, at equal steps of its distribution


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Beliefs:
    """``table`` [S, J] of true types, ``believed`` [S, I] of believed ones, whose names are those
    of the rows of weights that routers go by; ``confusion`` [J, I], rows sum to 1."""

    table: Table
    believed: Table
    confusion: Array

    @classmethod
    def of(cls, table: Table, *, spread_ln: float = SPREAD_LN) -> "Beliefs":
        """Types that no request is ever believed to be of are not among the believed ones."""
        every = confusion(table.types, spread_ln=spread_ln)
        kept = [int(i) for i in np.flatnonzero(every.any(axis=0))]
        chances = every[:, kept]
        return cls(table=table, believed=_believed(table, chances, kept), confusion=chances)

    def true_shares(self, shares: Array) -> Array:
        """[S, J]: what each column gets of the true types when routers follow ``shares`` [S, I] of
        the believed ones."""
        return shares @ self.confusion.T


def confusion(types: Sequence[TypeDemand], *, spread_ln: float = SPREAD_LN) -> Array:
    """[J, J]: the mean weight that the row of type i has for requests of type j; rows sum to 1.
    Types of different models are never taken for each other."""
    chances = np.zeros((len(types), len(types)))
    for model_id in dict.fromkeys(kind.model_id for kind in types):
        own = [j for j, kind in enumerate(types) if kind.model_id == model_id]
        chances[np.ix_(own, own)] = _confusion([types[j] for j in own], spread_ln)
    return chances


def _confusion(types: Sequence[TypeDemand], spread_ln: float) -> Array:
    """Of one model's types: the mean over ``DRAWS`` equally likely input lengths of each, since
    rounding to certainty is a step, which a quadrature of higher order would smear."""
    centres = np.log1p([kind.input_tokens for kind in types])
    normal = NormalDist()
    steps = np.array([normal.inv_cdf((draw + 0.5) / DRAWS) for draw in range(DRAWS)])
    inputs = centres[:, None] + spread_ln * steps  # [J, draws]
    return _chances(types, inputs, spread_ln).mean(axis=1)


def _chances(types: Sequence[TypeDemand], inputs_ln: Array, spread_ln: float) -> Array:
    """[..., J]: the weight that a router gives each type's row for requests of one model with
    ln(1 + input tokens) ``inputs_ln`` [...]."""
    centres = np.log1p([kind.input_tokens for kind in types])
    arrivals = np.array([kind.arrivals_rps for kind in types])
    prior = np.maximum(SHARE_MIN, arrivals / arrivals.sum())
    logs = -0.5 * ((inputs_ln[..., None] - centres) / spread_ln) ** 2 + np.log(prior)
    scores = np.exp(logs - logs.max(axis=-1, keepdims=True))
    chances = scores / scores.sum(axis=-1, keepdims=True)
    best = chances.max(axis=-1, keepdims=True)
    counted = np.where((chances > NEGLIGIBLE) | (best <= NEGLIGIBLE), chances, 0.0)
    mixed = counted / counted.sum(axis=-1, keepdims=True)
    certain = np.eye(len(types))[chances.argmax(axis=-1)]
    return np.where(best >= CERTAIN, certain, mixed)


def guessed(
    types: Sequence[TypeDemand],
    kinds: npt.NDArray[np.intp],
    input_tokens: Array,
    lots: Array,
    *,
    spread_ln: float = SPREAD_LN,
) -> npt.NDArray[np.intp]:
    """[N]: by which type's row a router sends each request, of true type ``kinds`` [N] and with
    ``input_tokens`` [N], drawn by its chances and ``lots`` [N], uniform on [0, 1). On average that
    is what mixing rows comes to."""
    found = kinds.copy()
    for model_id in dict.fromkeys(kind.model_id for kind in types):
        mine = [j for j, kind in enumerate(types) if kind.model_id == model_id]
        own = np.array(mine, np.intp)
        rows = np.flatnonzero(np.isin(kinds, own))
        if len(own) < 2 or not len(rows):  # noqa: PLR2004  # nothing to tell apart
            continue
        chances = _chances([types[j] for j in mine], np.log1p(input_tokens[rows]), spread_ln)
        upto = chances.cumsum(axis=1)
        place = (upto < lots[rows, None]).sum(axis=1)
        found[rows] = own[np.minimum(place, len(own) - 1)]
    return found


def _believed(table: Table, chances: Array, kept: Sequence[int]) -> Table:
    """The table of believed types, which are the true ones ``kept`` by name; ``chances`` [J, I]."""
    parts = table.demand[:, None] * chances
    arrivals = parts.sum(axis=0)
    parts = parts / arrivals  # w [J, I]
    types = tuple(
        _mixture(table, table.types[i], float(arrivals[at]), parts[:, at])
        for at, i in enumerate(kept)
    )
    late = parts[list(table.late)].sum(axis=0) > PART_MIN
    return Table(
        pools=table.pools,
        columns=table.columns,
        types=types,
        rates=_rates(table.rates, parts),
        late=tuple(int(i) for i in np.flatnonzero(late)),
    )


def _rates(rates: Array, parts: Array) -> Array:
    """n' [S, I] of ``rates`` n [S, J] and ``parts`` w [J, I]."""
    serves = rates > 0
    each = np.divide(1.0, rates, out=np.zeros_like(rates), where=serves)
    unable = 1.0 - serves @ parts
    slowest = (each[:, :, None] * (parts > 0)).max(axis=1, initial=0.0)
    time = each @ parts + np.maximum(unable, 0.0) * slowest
    limit = np.maximum(PART_MIN, unable.min(axis=0, initial=1.0))
    allowed = (time > 0) & (unable <= limit + ROUNDING)
    return np.divide(1.0, time, out=np.zeros_like(time), where=allowed)


def _mixture(table: Table, named: TypeDemand, arrivals_rps: float, parts: Array) -> TypeDemand:
    """A believed type of ``parts`` [J]: the mean of their lengths, the strictest of the targets of
    those that are frequent in it."""
    frequent = parts >= min(CLASS_SHARE_MIN, float(parts.max()))
    classes: dict[str, float] = {}
    for kind, part in zip(table.types, parts, strict=True):
        for name, share in kind.class_shares.items():
            classes[name] = classes.get(name, 0.0) + share * float(part)
    return TypeDemand(
        model_id=named.model_id,
        name=named.name,
        arrivals_rps=arrivals_rps,
        input_tokens=float(parts @ [kind.input_tokens for kind in table.types]),
        output_tokens=float(parts @ [kind.output_tokens for kind in table.types]),
        target=strictest(table.types[j].target for j in np.flatnonzero(frequent)),
        class_shares={name: share for name, share in classes.items() if share > 0},
    )
