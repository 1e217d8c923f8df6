"""``python -m tests.unit.scenarios.update``: write what the core does below each event."""

from tests.unit.scheduler_scenarios import Scenario, scenarios


def main() -> None:
    for path in scenarios():
        path.write_text(Scenario().run(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
