#include "kernels.h"

QUANTKIT_EXPORT_TABLE(avx2)
