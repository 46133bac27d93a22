"""The record of a run.

folder       the run folder: config, starts, results, the lock
metrics_log  the log of metrics, cut back on resume; `log_index` finds single lines of a long one
trackers     TensorBoard and wandb follow the log (`tensorboard_events`, `wandb_run`)
json_files   strict JSON
environment  code, versions and machine, for run.json
checkpoint   checkpoints with a checksum; `packing` puts small arrays together
restoring    reading them without touching their folder
progress     the progress line of a stage
stopping     graceful shutdown and exit codes
"""
