#pragma once

namespace quantkit {

// Whether this process was forked from one that had several threads. OpenMP's do not survive that: a child that
// asks for some waits for ever (torch's own operators do), so its kernels run on one.
bool forked_from_threads();

}  // namespace quantkit
