// SPDX-License-Identifier: GPL-2.0
/* Invariants while no pass is in progress. */
#include "model.h"

bool is_covered(unsigned long nr)
{
	return prb_index.chunks[nr >> PRB_CHUNK_SHIFT];
}

static bool is_in_summary(unsigned long nr)
{
	unsigned long *chunk = prb_index.chunks[nr >> PRB_CHUNK_SHIFT];

	return chunk && test_bit(nr & (PRB_CHUNK_SECTIONS - 1), chunk);
}

/* Blocks below the reporting order may keep a flag that nothing checks. */
static bool is_below_flags(unsigned int order)
{
#ifdef CORE_ALONE
	return false;
#else
	return order < prb_index.lowest_order;
#endif
}

/* A reportable block: each page has been reported or has its bit set. */
static void check_block(struct page *head, const struct mem_section_usage *usage)
{
	unsigned long bits = usage->reporting_old | atomic_long_read(&usage->reporting_young);

	for (unsigned long i = 0; i < 1UL << head->order; i++) {
		struct page *page = pfn_to_page(head->pfn + i);
		unsigned long bit = (page->pfn & (PAGES_PER_SECTION - 1)) >> PRB_GRANULE_ORDER;

		must(page->state == PAGE_FREE, "the model lost page %#lx", page->pfn);
		must(page->told || !head->reported || is_below_flags(head->order),
		     "page %#lx counts as reported and the host does not know it", page->pfn);
		must(!tracking || head->order < page_reporting_order || page->told || bits & BIT(bit) ||
		     !is_covered(pfn_to_section_nr(page->pfn)),
		     "page %#lx is lost: free, unknown to the host, no bit", page->pfn);
	}
}

static void check_section(unsigned long nr, const struct mem_section *section,
			  unsigned long *young, unsigned long *old)
{
	const struct mem_section_usage *usage = section->usage;
	unsigned long bits = usage->reporting_old | atomic_long_read(&usage->reporting_young);

	*young += hweight_long(atomic_long_read(&usage->reporting_young));
	*old += hweight_long(usage->reporting_old);
	must(!tracking || !bits || is_in_summary(nr), "section %lu has bits and is in no summary", nr);
	must(!bits || section->online || !tracking, "section %lu is offline and has bits", nr);
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i++) {
		struct page *page = &section->pages[i];

		must(page->state != PAGE_LENT, "page %#lx never came back", page->pfn);
		must(!page->in_flight, "page %#lx is still at the device", page->pfn);
		if (page->buddy)
			check_block(page, usage);
	}
}

void check_all(void)
{
	unsigned long nr, young = 0, old = 0;

	must(!in_pass && !zone_lock_held && !prb_index.index_lock.held, "a lock is still held");
	for (nr = next_present_section_nr(-1UL); nr != -1UL; nr = next_present_section_nr(nr))
		check_section(nr, __nr_to_section(nr), &young, &old);
	must(young == (unsigned long)atomic_long_read(&prb_index.nr_young),
	     "%lu granules are young, counted were %ld", young,
	     atomic_long_read(&prb_index.nr_young));
	must(old == prb_index.nr_old, "%lu granules are old, counted were %lu", old,
	     prb_index.nr_old);
	must(!prb_index.isolated_pages, "%lu pages count as isolated", prb_index.isolated_pages);
}

/* After undisturbed passes, all free memory has been reported. */
void check_all_told(void)
{
	unsigned long nr;

	for (nr = next_present_section_nr(-1UL); nr != -1UL; nr = next_present_section_nr(nr)) {
		struct mem_section *section = __nr_to_section(nr);

		for (unsigned long i = 0; section->online && is_covered(nr) && i < PAGES_PER_SECTION;
		     i++) {
			struct page *page = &section->pages[i];
			struct zone *zone = page->zone;
			unsigned long lent = PAGE_REPORTING_CAPACITY << page_reporting_order;

			/* A zone keeps the memory that its watermark requires. */
			if (!page->buddy || page->order < page_reporting_order ||
			    memory_is_out_of_reach(page->pfn, page->order) ||
			    zone->free_pages <= zone->low_pages + lent + (1UL << MAX_PAGE_ORDER))
				continue;
			for (unsigned long n = 0; n < 1UL << page->order; n++)
				must(page[n].told, "page %#lx is free and was not reported",
				     page[n].pfn);
		}
	}
}
