"""Whatever plan is written comes back the same."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from loadgen.planning.plan_file import dump_plan, read_plan, write_plan
from services.scheduler.plan_id import make_plan
from services.scheduler.policies.weights import joined
from shared.hardware import Parallelism
from shared.messages.plans import DeploymentPlan, ReplicaSpec

IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
MODELS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,40}", fullmatch=True)
COMMENTS = st.lists(st.text(max_size=30), max_size=3)


@st.composite
def plans(draw: st.DrawFn) -> DeploymentPlan:
    """Replicas of up to three models, and weights as policies make them of any shares."""
    models = draw(st.lists(MODELS, min_size=1, max_size=3, unique=True))
    replicas: list[ReplicaSpec] = []
    gpus = 0
    for replica_id in draw(st.lists(IDS, min_size=1, max_size=6, unique=True)):
        shape = Parallelism(draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2])))
        named = tuple(f"n{gpu // 8}-g{gpu % 8}" for gpu in range(gpus, gpus + shape.gpus))
        gpus += shape.gpus
        replicas.append(
            ReplicaSpec(
                replica_id=replica_id,
                model_id=draw(st.sampled_from(models)),
                parallelism=str(shape),
                gpus=named,
            )
        )
    shares = st.floats(1e-6, 1e6)
    rows = {
        model_id: {
            str(number): {
                spec.replica_id: draw(shares) for spec in replicas if spec.model_id == model_id
            }
            for number in draw(st.lists(st.integers(0, 300), max_size=3, unique=True))
        }
        for model_id in models
    }
    return make_plan(replicas, joined(rows), reason="drawn")


@given(plans(), COMMENTS)
def test_plans_come_back_as_they_were_written(plan: DeploymentPlan, comments: list[str]) -> None:
    """A plan changed by its file would be another plan, and move replicas when it is adopted."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "plan.toml"
        write_plan(plan, path, comments=comments)
        again = read_plan(path)
        assert again.replicas == plan.replicas
        assert again.weights == plan.weights
        assert again.plan_id == plan.plan_id
        assert dump_plan(again, comments=comments) == path.read_text()
