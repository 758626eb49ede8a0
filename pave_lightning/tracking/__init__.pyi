from .environment import environment_tags as environment_tags
from .record import record_stage as record_stage
from .tracker import FALLBACK_URI as FALLBACK_URI
from .tracker import Tracker as Tracker
from .uris import resolve_uri as resolve_uri
