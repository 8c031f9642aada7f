"""The flag `--config` of every command: defined once, so that one process may import several commands."""

from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file, such as configs/quickstart.py.")
