"""The test files of Transformers as a package: `tests.transformers_suite.upstream.test_modeling_common` and so on.

A few modules those files import are not in the source distribution; stand-ins of this folder take their place. A
process that unpickles a function of these files imports this module first, so worker processes find the stand-ins too.
"""

import sys

from tests.transformers_suite import config_values, export_mixin, generation_mixin, worker_processes
from tests.transformers_suite.fetch import sources_folder

__path__ = [str(sources_folder())]

_STAND_INS = {
    "distributed_testing_utils": worker_processes,
    "exporters.test_export": export_mixin,
    "generation.test_utils": generation_mixin,
    "utils.test_configuration_utils": config_values,
}
for _name, _module in _STAND_INS.items():
    sys.modules[f"{__name__}.{_name}"] = _module
