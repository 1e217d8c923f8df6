"""What the doctor says of profiles."""

from pathlib import Path

from deploy.doctor import diagnose

TOPOLOGY = """
[mesh.engine.modelled]
timing = "profile"

[[mesh.nodes]]
node_id = "n0"
gpu_kind = "no-such-gpu"
"""


def findings(file: Path, text: str) -> list[tuple[str, str]]:
    file.write_text(text)
    return [(f.level, f.text) for f in diagnose(file) if f.subject == "profiles"]


def test_a_gpu_without_a_profile_is_found(tmp_path: Path) -> None:
    """Otherwise the first thing to show it would be a worker that ends at its start."""
    (found,) = findings(tmp_path / "t.toml", TOPOLOGY)
    assert found[0] == "FAIL"
    assert "mesh.nodes.n0.gpu_kind" in found[1]


def test_engines_without_profiles_are_left_alone(tmp_path: Path) -> None:
    """Otherwise every topology would be asked for profiles that it does not use."""
    assert findings(tmp_path / "t.toml", TOPOLOGY.replace('"profile"', '"settings"')) == []
