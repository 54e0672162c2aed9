// SPDX-License-Identifier: GPL-2.0
/*
 * The device and its host, which records every report of each page. Reports are
 * checked when they arrive.
 */
#include "model.h"

#define BATCHES_MAX 8

struct page_reporting_dev_info device;
unsigned long passes;
bool in_pass, minds_age;

static bool failing;

/* Batches at the device, as reported. */
static struct batch {
	void *token;
	unsigned int count;
	struct { unsigned long pfn, pages; } ranges[PRB_BATCH_ENTRIES_MAX];
} batches[BATCHES_MAX];
static unsigned int in_flight;

/*
 * Pages that may be reported again, together with the rest of their granule or
 * of the smallest reportable block.
 */
void host_doubts(unsigned long pfn, unsigned long pages)
{
	unsigned long unit = max(PRB_GRANULE_PAGES, 1UL << page_reporting_order);
	unsigned long end = pfn + pages;

	for (pfn = round_down(pfn, unit); pfn < end || pfn & (unit - 1); pfn++)
		pfn_to_page(pfn)->news = true;
}

/* All pages may be reported again. */
void host_doubts_all(void)
{
	unsigned long nr;

	for (nr = next_present_section_nr(-1UL); nr != -1UL; nr = next_present_section_nr(nr))
		host_doubts(section_nr_to_pfn(nr), PAGES_PER_SECTION);
}

void host_forgets(unsigned long nr)
{
	unsigned long start = section_nr_to_pfn(nr);

	if (!__nr_to_section(nr))
		return;
	host_doubts(start, PAGES_PER_SECTION);
	for (unsigned long pfn = start; pfn < start + PAGES_PER_SECTION; pfn++)
		pfn_to_page(pfn)->told = false;
}

void host_forgets_all(void)
{
	for (int i = 0; i < SECTIONS; i++)
		host_forgets(section_numbers[i]);
}

void host_sees_change(unsigned long pfn, unsigned int order)
{
	host_doubts(pfn, 1UL << order);
	for (unsigned long i = 0; i < 1UL << order; i++) {
		struct page *page = pfn_to_page(pfn + i);

		must(!page->in_flight, "page %#lx is used while the device discards it", page->pfn);
		page->told = false;
	}
}

void host_sees_free(unsigned long pfn, unsigned int order)
{
	for (unsigned long i = 0; i < 1UL << order; i++) {
		struct page *page = pfn_to_page(pfn + i);

		page->freed_in = passes;
		page->freed_in_pass = in_pass;
	}
}

bool host_is_failing(void)
{
	return failing;
}

void host_set_failing(bool value)
{
	failing = value;
}

unsigned long host_told_pages(void)
{
	unsigned long nr, count = 0;

	for (nr = next_present_section_nr(-1UL); nr != -1UL; nr = next_present_section_nr(nr))
		for (unsigned long i = 0; i < PAGES_PER_SECTION; i++)
			count += pfn_to_page(section_nr_to_pfn(nr) + i)->told;
	return count;
}

/* ---- Checks of a report ---- */

static bool has_news(unsigned long granule, unsigned long from, unsigned long to)
{
	for (unsigned long pfn = max(granule, from); pfn < min(granule + PRB_GRANULE_PAGES, to); pfn++)
		if (!pfn_to_page(pfn)->told || pfn_to_page(pfn)->news)
			return true;
	return false;
}

/* After a failed report, all of its blocks are reported again. */
static void doubt_block_of(unsigned long pfn)
{
	unsigned long head = pfn;

	while (!page_private(pfn_to_page(head)))
		head--;
	host_doubts(head, 1UL << page_private(pfn_to_page(head)));
}

/* Memory without a recorded free has no age: it is reported in any pass. */
static void check_age(unsigned long pfn)
{
	const struct page *page = pfn_to_page(pfn);
	unsigned long earliest = page->freed_in + (page->freed_in_pass ? 1 : 2);

	must(!minds_age || !page->freed_in || passes >= earliest,
	     "page %#lx was freed in pass %lu%s and is reported in pass %lu", pfn,
	     page->freed_in, page->freed_in_pass ? "" : " or after it", passes);
}

/* Whether the device accepts one entry per range that a block can consist of. */
static bool takes_all_ranges(void)
{
	return device.any_length && device.entries >= BITS_PER_LONG / 2;
}

/*
 * Reported pages are known from here on, except in granules that are reported
 * in pieces: some pieces may merge before the last report, and be reported again.
 */
static void no_news(unsigned long from, unsigned long to, unsigned long first, unsigned long last)
{
	for (unsigned long granule = first; granule <= last; granule += PRB_GRANULE_PAGES) {
		if (granule < from || granule + PRB_GRANULE_PAGES > to)
			continue;
		/* May have been reported with its neighbours, see below. */
		if (device.any_length && !takes_all_ranges() && granule != first && granule != last)
			continue;
		for (unsigned long pfn = granule; pfn < granule + PRB_GRANULE_PAGES; pfn++)
			pfn_to_page(pfn)->news = false;
	}
}

/* One block per entry: some of it must be unreported, and all must have reached its age. */
static void check_whole_block(unsigned long from, unsigned long to)
{
	bool news = false;

	must(page_private(pfn_to_page(from)) && to - from == 1UL << page_private(pfn_to_page(from)),
	     "the entry at page %#lx is not one block", from);
	for (unsigned long granule = round_down(from, PRB_GRANULE_PAGES); granule < to;
	     granule += PRB_GRANULE_PAGES)
		news |= has_news(granule, from, to);
	must(news, "page %#lx is reported twice without a change", from);
	for (unsigned long pfn = from; pfn < to; pfn++)
		check_age(pfn);
}

/*
 * The part of a range that belongs to one block: each granule must be unreported.
 * If the device accepts few entries, gaps between granules may be included.
 */
static void check_part(unsigned long from, unsigned long to)
{
	unsigned long first = round_down(from, PRB_GRANULE_PAGES);
	unsigned long last = round_down(to - 1, PRB_GRANULE_PAGES);

	if (!device.any_length) {
		check_whole_block(from, to);
		no_news(from, to, first, last);
		return;
	}
	for (unsigned long granule = first; granule <= last; granule += PRB_GRANULE_PAGES) {
		unsigned long end = min(granule + PRB_GRANULE_PAGES, to);

		if (!takes_all_ranges() && granule != first && granule != last)
			continue;
		must(has_news(granule, from, to), "page %#lx is reported twice without a change",
		     max(granule, from));
		for (unsigned long pfn = max(granule, from); pfn < end; pfn++)
			check_age(pfn);
	}
	no_news(from, to, first, last);
}

static void check_range(unsigned long from, unsigned long pages)
{
	unsigned long part = from, pfn;

	must(pages, "an empty range is reported");
	must(pfn_to_section_nr(from) == pfn_to_section_nr(from + pages - 1),
	     "the range from page %#lx leaves its section", from);
	for (pfn = from; pfn < from + pages; pfn++) {
		struct page *page = pfn_to_page(pfn);

		must(page->state == PAGE_LENT, "page %#lx is reported and not lent", pfn);
		must(!page->in_flight, "page %#lx is reported twice at once", pfn);
	}
	/* Blocks start at multiples of their size; the first page has their order. */
	while (part < from + pages) {
		unsigned long end = from + pages;

		for (pfn = part + 1; pfn < end; pfn++)
			if (page_private(pfn_to_page(pfn)))
				break;
		check_part(part, pfn);
		part = pfn;
	}
}

/* ---- The device ---- */

static struct batch *accept(struct scatterlist *sg, unsigned int count, void *token)
{
	struct batch *batch = &batches[in_flight++];
	unsigned long behind = 0;

	must(in_flight <= BATCHES_MAX && in_flight <= max(device.batches, 1U),
	     "%u batches are at the device", in_flight);
	must(count && count <= device.entries, "a batch has %u entries", count);
	must(sg[count - 1].end, "the last entry is not marked");
	batch->token = token;
	batch->count = count;
	for (unsigned int i = 0; i < count; i++) {
		unsigned long pfn = page_to_pfn(sg[i].page), pages = sg[i].length >> PAGE_SHIFT;

		must(pfn >= behind, "entries are not in the order of addresses");
		behind = pfn + pages;
		check_range(pfn, pages);
		batch->ranges[i].pfn = pfn;
		batch->ranges[i].pages = pages;
	}
	for (unsigned int i = 0; i < count; i++)
		for (unsigned long n = 0; n < batch->ranges[i].pages; n++) {
			struct page *page = pfn_to_page(batch->ranges[i].pfn + n);

			page->in_flight = true;
		}
	return batch;
}

/* The device completes a batch; unless it rejects it, the host knows the pages. */
static void *answer(unsigned int index, bool taken)
{
	struct batch *batch = &batches[index];
	void *token = batch->token;

	for (unsigned int i = 0; i < batch->count; i++)
		for (unsigned long n = 0; n < batch->ranges[i].pages; n++) {
			struct page *page = pfn_to_page(batch->ranges[i].pfn + n);

			page->in_flight = false;
			if (taken)
				page->told = true;
			else
				doubt_block_of(page->pfn);
		}
	*batch = batches[--in_flight];
	return token;
}

static int host_report(struct page_reporting_dev_info *prdev, struct scatterlist *sg,
		       unsigned int count)
{
	bool taken = !failing || one_in(2);

	must(prdev == &device && !zone_lock_held, "a report is made under a zone lock");
	accept(sg, count, sg);
	others_run();
	answer(in_flight - 1, taken);
	return taken ? 0 : -5;
}

#ifndef CORE_ALONE
static int host_submit(struct page_reporting_dev_info *prdev, struct scatterlist *sg,
		       unsigned int count, void *token)
{
	must(prdev == &device && !zone_lock_held, "a report is made under a zone lock");
	accept(sg, count, token);
	if (failing && one_in(2)) {
		answer(in_flight - 1, false);
		return -5;
	}
	others_run();
	return 0;
}

static void *host_reap(struct page_reporting_dev_info *prdev, bool wait)
{
	must(prdev == &device && !zone_lock_held, "the device is asked under a zone lock");
	must(!prb_index.index_lock.held || !wait, "the device is waited for under index_lock");
	others_run();
	if (!in_flight || (!wait && one_in(2)))
		return NULL;
	/* Batches complete in any order. */
	return answer(chance(in_flight), true);
}
#endif

void host_init(bool queue, unsigned int capacity, unsigned int count)
{
	device = (struct page_reporting_dev_info){
		.report = host_report,
		/* A device that queues batches accepts ranges; others may. */
		.any_length = queue || one_in(2),
		.entries = PAGE_REPORTING_CAPACITY,
		.batches = 1,
	};
#ifndef CORE_ALONE
	if (queue) {
		device.submit = host_submit;
		device.reap = host_reap;
		device.entries = capacity;
		device.batches = count;
	}
#endif
	in_flight = 0;
	/* The same host behind another device: it keeps its records. */
	host_doubts_all();
}
