// SPDX-License-Identifier: GPL-2.0
/* The core as it is in the kernel, on our stand-in for the kernel. */
#include "page_reporting_bitmap.c"
