// SPDX-License-Identifier: GPL-2.0
/* Tests the limit on bytes per second, and that it starves no section. */
#include "model.h"

/* A section at a low address that is never idle, and one behind it. */
#define BUSY 0UL
#define PATIENT 7UL
#define SECONDS 400

static void set_rate(u64 bytes_per_second)
{
	prb_index.bytes_per_second = bytes_per_second;
	prb_index.tokens = 0;
	prb_index.tokens_at = jiffies;
}

/* As if all of it had been used, and then been free for long enough. */
static void renew(unsigned long nr)
{
	unsigned long start = section_nr_to_pfn(nr);

	host_forgets(nr);
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i++)
		pfn_to_page(start + i)->reported = false;
	mutex_lock(&prb_index.index_lock);
	prb_online_section(nr);
	mutex_unlock(&prb_index.index_lock);
}

void check_rates(void)
{
	unsigned long start = section_nr_to_pfn(PATIENT);

	/* Any number is a valid rate, including the largest. */
	set_rate(~0UL);
	jiffies += HZ;
	must(pass(PRB_ANY_AGE).end == PRB_END_DONE, "the highest rate lets nothing leave");

	/* A pass continues where the last one ended. */
	renew(PATIENT);
	set_rate((1UL << PAGE_SHIFT) << MAX_PAGE_ORDER);
	for (int i = 0; i < SECONDS; i++) {
		jiffies += HZ;
		renew(BUSY);
		pass(PRB_ANY_AGE);
	}
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i++)
		must(pfn_to_page(start + i)->told, "page %#lx had no turn in %d seconds", start + i,
		     SECONDS);
	set_rate(0);
}
