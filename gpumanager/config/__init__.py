"""The config file: read, checked as a whole, and handed on as frozen models."""

from gpumanager.config.faults import ConfigError, Fault
from gpumanager.config.loading import (
    CONFIG_ENV,
    DEFAULT_CONFIG_PATH,
    config_path_from_env,
    load_config,
    parse_config,
)
from gpumanager.config.schema import (
    KINDS,
    AuthConfig,
    Call,
    Config,
    ConsumerConfig,
    GpuConfig,
    Kind,
    LoadCall,
    LogConfig,
    Probe,
    Route,
    SchedulerConfig,
    Timeouts,
    UnloadCall,
)

__all__ = [
    "CONFIG_ENV",
    "DEFAULT_CONFIG_PATH",
    "KINDS",
    "AuthConfig",
    "Call",
    "Config",
    "ConfigError",
    "ConsumerConfig",
    "Fault",
    "GpuConfig",
    "Kind",
    "LoadCall",
    "LogConfig",
    "Probe",
    "Route",
    "SchedulerConfig",
    "Timeouts",
    "UnloadCall",
    "config_path_from_env",
    "load_config",
    "parse_config",
]
