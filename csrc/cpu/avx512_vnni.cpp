#include "linear.h"

QUANTKIT_EXPORT_LINEAR(avx512_vnni)
