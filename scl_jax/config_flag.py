"""The flag `--config` of every command: defined once, so that one process may import several commands."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, such as configs/quickstart.py.")


def parse(arguments: list[str]) -> list[str]:
    """absl's parser of flags; a config file or an option of it that there is not ends the program with one line."""
    for argument in arguments[1:]:
        name, _, value = argument.partition("=")
        file = value.partition(":")[0]
        if name.lstrip("-") == "config" and file and (not Path(file).exists() or Path(file).is_dir()):
            sys.exit(f"error: there is no config file {file}")
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        *_, last = str(error).strip().splitlines()
        if "get_config() takes" in last or "this config has no variant" in last:
            sys.exit(
                f"error: what stands behind the colon of --config is nothing that the config takes ({last.strip()})"
            )
        return app.parse_flags_with_usage(arguments)  # says it in absl's way, and ends
    except ModuleNotFoundError as error:
        if error.name != "configs":
            raise
        sys.exit("error: the config takes parts of other configs: run the command from the root of the repository")
    except (AttributeError, KeyError) as error:
        # an override; a mistake within the config file keeps its traceback
        if not any(frame.filename.endswith("config_path.py") for frame in traceback.extract_tb(error.__traceback__)):
            raise
        said = " ".join(str(error.args[0] if error.args else error).replace("\\n", " ").split())
        said = said.replace("\\'", "").replace("'", "").replace(" Did", "; did")
        sys.exit(f"error: an option that the config does not have: {said} (scl_jax/config.py lists all)")
