"""The config file: read, checked as a whole, and handed on as frozen models."""

from gpumanager.config.calls import (
    Call,
    Done,
    Health,
    LoadCall,
    Lost,
    ModelEntry,
    ModelList,
    Probe,
    Route,
    Session,
    Settled,
    UnloadCall,
)
from gpumanager.config.faults import ConfigError
from gpumanager.config.loading import (
    CONFIG_ENV,
    config_path_from_env,
    load_config,
    parse_config,
    read_config_file,
    users_config_path,
)
from gpumanager.config.memory import EvictionMethod, OutOfMemory
from gpumanager.config.schema import (
    KINDS,
    Config,
    ConsumerConfig,
    EventsConfig,
    GpuConfig,
    LogConfig,
    SchedulerConfig,
    Timeouts,
)

__all__ = [
    "CONFIG_ENV",
    "KINDS",
    "Call",
    "Config",
    "ConfigError",
    "ConsumerConfig",
    "Done",
    "EventsConfig",
    "EvictionMethod",
    "GpuConfig",
    "Health",
    "LoadCall",
    "LogConfig",
    "Lost",
    "ModelEntry",
    "ModelList",
    "OutOfMemory",
    "Probe",
    "Route",
    "SchedulerConfig",
    "Session",
    "Settled",
    "Timeouts",
    "UnloadCall",
    "config_path_from_env",
    "load_config",
    "parse_config",
    "read_config_file",
    "users_config_path",
]
