"""What a real run needs around the method: folders, processes, flags, data, reports and checkpoints."""

import os

# On Linux torch then asks for huge pages for its large CPU tensors, and the kernel hands out a 512th as many.
# torch looks at this when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
