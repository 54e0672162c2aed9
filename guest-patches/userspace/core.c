// SPDX-License-Identifier: GPL-2.0
/* The kernel's core, unchanged, on our replacement for the kernel. */
#include "page_reporting_bitmap.c"

/* Internals of the file that the tests need. */
#ifndef CORE_ALONE
const unsigned long full_granules = PRB_FULL_GRANULES, worth_granules = PRB_WORTH_GRANULES;
#endif
const unsigned long lent_pages_min = PRB_LENT_PAGES_MIN, lent_pages_max = PRB_LENT_PAGES_MAX;
