"""rar config: every key with its default and meaning, as commented YAML."""

from __future__ import annotations

import typer

from rar.config import reference


def config() -> None:
    """Print every key of a config, with its default and what it means, as YAML.

    Example: rar config > all.yaml
    """
    print(reference())


if __name__ == "__main__":
    typer.run(config)
