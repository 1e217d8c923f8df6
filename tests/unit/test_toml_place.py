"""Whether an error about a topology says where in the file to look."""

from pathlib import Path

import pytest

from shared.errors import ConfigInvalid
from shared.toml_place import line_of, located

TEXT = """# a topology
[mesh]
name = "m"

[mesh.engine]
kind = "modelled"

[mesh.engine.modelled]
block_tokens = 16

[[mesh.nodes]]
node_id = "n0"
gpus = 8

[[mesh.nodes]]
node_id = "n1"
gpus = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "topology.toml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("mesh.name", 3),
        ("mesh.engine.modelled.block_tokens", 9),
        ("mesh.engine.modelled.absent", 8),  # the table it should stand in
        ("mesh.nodes[1].gpus", 17),
        ("mesh.nodes.n0.gpus", 13),
        ("mesh.nodes.n1.gpu_kind", 15),
        ("router.policy", 0),
    ],
)
def test_fields_are_found(file: Path, field: str, line: int) -> None:
    """A user with sixteen nodes would look at the wrong one."""
    assert line_of(file, field) == line


def test_errors_name_file_and_line(file: Path) -> None:
    """A field alone does not say in which of several files it is."""
    with pytest.raises(ConfigInvalid, match="topology.toml, line 13: mesh.nodes") as caught:  # noqa: RUF043, SIM117
        with located(file, sections=("mesh",)):
            raise ConfigInvalid(field="mesh.nodes.n0.gpus", value=0, remedy="give it 1")
    assert caught.value.field == "mesh.nodes.n0.gpus"


@pytest.mark.parametrize("field", ["--set mesh.name", "mesh.name", "mesh.name.part"])
def test_what_was_set_elsewhere_is_not_blamed_on_the_file(file: Path, field: str) -> None:
    """The user would mend a line that is overridden."""
    with pytest.raises(ConfigInvalid) as caught:  # noqa: SIM117
        with located(file, sections=("mesh",), but=("mesh.name",)):
            raise ConfigInvalid(field=field, value="x", remedy="write another")
    assert str(file) not in str(caught.value)


def test_fields_of_files_without_tables_and_of_quoted_ones_are_found(tmp_path: Path) -> None:
    """A file of one line would end in a stack trace, and a row for "*" have no line."""
    file = tmp_path / "plan.toml"
    file.write_text("horizon_s = 1\n")
    assert line_of(file, "horizon_s") == 1
    assert line_of(file, "other.horizon_s") == 0
    file.write_text('[[replicas]]\nid = "a"\n[weights."*"]\na = 1.0\n')
    assert line_of(file, "weights.*.a") == 4
    assert line_of(file, "weights") == 3
    file.write_text("")
    assert line_of(file, "weights") == 0
