"""The mutants, by what they spoil."""

from tests.mutants.catalogue.device import DEVICE
from tests.mutants.catalogue.plan import PLAN
from tests.mutants.catalogue.pool import POOL
from tests.mutants.catalogue.recalling import RECALLING
from tests.mutants.catalogue.surroundings import SURROUNDINGS
from tests.mutants.catalogue.telling import TELLING

MUTANTS = (*PLAN, *POOL, *RECALLING, *DEVICE, *TELLING, *SURROUNDINGS)
