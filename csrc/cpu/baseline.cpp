#include "table.h"

QUANTKIT_EXPORT_TABLE(baseline)
