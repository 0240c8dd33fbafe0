"""How hypothesis runs here: time decides nothing, since a machine may be busy; a failure can be had again with its seed."""

from hypothesis import HealthCheck, settings

settings.register_profile("unibus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unibus")
