from .stored import StoredPurification as StoredPurification
from .stored import write_purified as write_purified
from .vectors import KeptRank as KeptRank
from .vectors import PurifiedTaskVectors as PurifiedTaskVectors
