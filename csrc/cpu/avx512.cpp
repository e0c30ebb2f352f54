#include "loops.h"

QUANTKIT_EXPORT_TABLE(avx512)
