// SPDX-License-Identifier: GPL-2.0
/* Tests the limit on a zone's memory at the device, which depends only on counters. */
#include "model.h"

static struct zone zone;

static unsigned long may_lend(unsigned int order, unsigned long small, unsigned long large)
{
	zone.free_area[0].nr_free = small;
	zone.free_area[MAX_PAGE_ORDER].nr_free = large >> MAX_PAGE_ORDER;
	zone.free_pages = small + large;
	return prb_may_lend(&zone, order);
}

void check_lending(void)
{
	const unsigned long block = 1UL << MAX_PAGE_ORDER;
	const unsigned long high = zone.high_pages = 100 * block;

	/* A sixteenth of what is above the watermark, */
	must(may_lend(MAX_PAGE_ORDER, 0, high + 16 * 2 * lent_pages_min) == 2 * lent_pages_min,
	     "a zone lends no sixteenth");
	/* in large blocks: small ones do not help a huge page. */
	must(may_lend(MAX_PAGE_ORDER, lent_pages_max * 16, 4 * block) == 3 * block,
	     "small blocks count as large ones");
	must(may_lend(0, lent_pages_max * 16 + high, 0) == lent_pages_max,
	     "small blocks do not count for a small one");
	/* No more than a batch. */
	must(may_lend(MAX_PAGE_ORDER, 0, lent_pages_max * 32) == lent_pages_max,
	     "a zone lends more than a batch");
	/* As much as mainline's tracker takes at a time, even below the watermark, */
	must(may_lend(MAX_PAGE_ORDER, 0, high + 2 * lent_pages_min) == lent_pages_min,
	     "a zone lends less than mainline's tracker takes");
	/* but never more than remains, */
	must(may_lend(MAX_PAGE_ORDER, 0, 8 * block) == 7 * block, "all of a zone is lent");
	/* not counting isolated pageblocks. */
	zone.free_pages = 2 * block;
	must(prb_may_lend(&zone, MAX_PAGE_ORDER) == block, "isolated blocks count as free");
	/* One block is always allowed. */
	must(may_lend(MAX_PAGE_ORDER, 0, block) == block, "the last block may not go");
}
