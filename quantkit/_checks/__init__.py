"""Every error of the contract, once for Python: the reference, the fallback and the fake kernels.

``csrc/torch/checks/`` says the same in the same words for the compiled operators.
"""

from .operators import *
from .outputs import *
from .parameters import *
from .sizes import *
from .values import *
