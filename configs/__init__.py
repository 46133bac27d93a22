"""Configs: data only. One file per method, each with `get_config(arg="")`."""
