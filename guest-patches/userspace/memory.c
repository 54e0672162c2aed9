// SPDX-License-Identifier: GPL-2.0
/*
 * A buddy allocator with zones, holes, isolated pageblocks and hotplug: the
 * rules of mm/page_alloc.c and mm/memory_hotplug.c, with one struct per page.
 */
#include "model.h"

/* Three chunks of the summary, holes, and a section shared by two zones. */
const unsigned long section_numbers[SECTIONS] = {
	0, 1, 2, 3, 6, 7, 40000, 8, 9, 12, 40001, 40063, 70000,
};
static struct mem_section sections[SECTIONS];

struct zone zones[MAX_NR_ZONES];
spinlock_t *zone_lock_held;
unsigned long jiffies = 1000000;
unsigned int page_reporting_order = PAGEBLOCK_ORDER;
bool tracking;
bool memory_is_scarce;

static bool isolated[SECTIONS][PAGES_PER_SECTION >> PAGEBLOCK_ORDER];

/* Blocks in use, which can be freed. */
static struct { unsigned long pfn; unsigned int order; } *used;
static unsigned long used_count, used_max;

static int section_index(unsigned long nr)
{
	for (int i = 0; i < SECTIONS; i++)
		if (section_numbers[i] == nr)
			return i;
	return -1;
}

struct mem_section *__nr_to_section(unsigned long nr)
{
	int index = section_index(nr);

	return index >= 0 && sections[index].usage ? &sections[index] : NULL;
}

unsigned long next_present_section_nr(unsigned long nr)
{
	unsigned long next = -1UL;

	for (int i = 0; i < SECTIONS; i++) {
		unsigned long own = section_numbers[i];

		if (sections[i].usage && (nr == -1UL || own > nr) && own < next)
			next = own;
	}
	return next;
}

static bool *isolated_flag(unsigned long pfn)
{
	int index = section_index(pfn_to_section_nr(pfn));

	return &isolated[index][(pfn & (PAGES_PER_SECTION - 1)) >> PAGEBLOCK_ORDER];
}

bool memory_is_isolated(unsigned long pfn)
{
	return *isolated_flag(pfn);
}

/* The first zone ends inside a section, and a granule, where blocks are small enough. */
static struct zone *zone_of(unsigned long pfn)
{
	unsigned long border = 2 * PAGES_PER_SECTION - (1UL << MAX_PAGE_ORDER);

	if (MAX_PAGE_ORDER < PFN_SECTION_SHIFT)
		border -= 24;

	if (pfn < border)
		return &zones[0];
	return pfn_to_section_nr(pfn) < 40000 ? &zones[1] : &zones[2];
}

bool memory_is_out_of_reach(unsigned long pfn, unsigned int order)
{
	return order < PRB_GRANULE_ORDER &&
	       zone_of(pfn) != zone_of(round_down(pfn, PRB_GRANULE_PAGES));
}

/* ---- Free lists ---- */

static void list_block(struct page *page, unsigned int order, bool tail)
{
	struct free_area *area = &page->zone->free_area[order];

	page->buddy = true;
	page->order = order;
	page->zone->free_pages += memory_is_isolated(page->pfn) ? 0 : 1UL << order;
	area->nr_free++;
	if (tail)
		list_add_tail(&page->lru, &area->list);
	else
		list_add(&page->lru, &area->list);
}

static void unlist_block(struct page *page)
{
	page->zone->free_pages -= memory_is_isolated(page->pfn) ? 0 : 1UL << page->order;
	page->zone->free_area[page->order].nr_free--;
	page->buddy = false;
	page->reported = false;
	list_del(&page->lru);
}

static void set_state(unsigned long pfn, unsigned int order, int state)
{
	for (unsigned long i = 0; i < 1UL << order; i++)
		pfn_to_page(pfn + i)->state = state;
}

static struct page *buddy_of(unsigned long pfn, unsigned int order, struct zone *zone)
{
	unsigned long buddy = pfn ^ (1UL << order);
	struct page *page;

	if (!__nr_to_section(pfn_to_section_nr(buddy)))
		return NULL;
	page = pfn_to_page(buddy);
	if (!page->buddy || page->order != order || page->zone != zone)
		return NULL;
	/* Isolated pageblocks have separate lists. */
	if (order >= PAGEBLOCK_ORDER && memory_is_isolated(pfn) != memory_is_isolated(buddy))
		return NULL;
	return page;
}

/* __free_one_page() */
static void free_block(unsigned long pfn, unsigned int order, bool notify, bool tail)
{
	struct zone *zone = pfn_to_page(pfn)->zone;
	unsigned long head = pfn;
	unsigned int merged = order;

	must(zone->lock.held, "the zone lock is not held");
	set_state(pfn, order, PAGE_FREE);
	while (merged < MAX_PAGE_ORDER) {
		struct page *buddy = buddy_of(head, merged, zone);

		if (!buddy)
			break;
		unlist_block(buddy);
		head &= ~(1UL << merged);
		merged++;
	}
	list_block(pfn_to_page(head), merged, tail);
	if (notify && tracking && merged >= page_reporting_order) {
		/* Memory that comes online with the first section of a chunk has no age. */
		if (is_covered(pfn_to_section_nr(pfn)))
			host_sees_free(pfn, order);
		prb_mark_young(pfn, order);
	}
}

/* ---- The reporter's part: mm/page_alloc.c of the series ---- */

/* While the device works, the zone keeps more blocks of this size than the device has. */
static void check_rest(const struct zone *zone, unsigned int order)
{
	unsigned long stay = 0, lent = 0, nr;

	for (unsigned int i = min(order, pageblock_order); i <= MAX_PAGE_ORDER; i++)
		stay += zone->free_area[i].nr_free << i;
	for (nr = next_present_section_nr(-1UL); nr != -1UL; nr = next_present_section_nr(nr))
		for (unsigned long i = 0; i < PAGES_PER_SECTION; i++) {
			struct page *page = pfn_to_page(section_nr_to_pfn(nr) + i);

			lent += page->zone == zone && page->state == PAGE_LENT;
		}
	must(lent == 1UL << order || lent <= stay, "a zone lends %lu pages and keeps %lu", lent, stay);
	must(lent == 1UL << order || lent <= lent_pages_min, "a zone lends %lu pages", lent);
}

bool page_reporting_take_block(struct page *page, unsigned int order)
{
	struct zone *zone = page->zone;

	must(zone->lock.held, "a block is taken without the zone lock");
	must(in_pass, "a block is taken outside a pass");
	for (unsigned long i = 0; i < 1UL << order; i++)
		must(pfn_to_page(page->pfn + i)->state == PAGE_FREE,
		     "page %#lx is in use or lent, and taken", page->pfn + i);
	must(page->buddy && page->order == order, "page %#lx heads no free block of order %u",
	     page->pfn, order);
	if (memory_is_isolated(page->pfn))
		return false;
	must(zone->free_pages - (1UL << order) >= zone->low_pages,
	     "a zone falls below its low watermark");
	unlist_block(page);
	set_state(page->pfn, order, PAGE_LENT);
	check_rest(zone, order);
	return true;
}

#ifdef BUG_TWICE
/* Planted: a block that comes back from the device counts as freed. */
#define COMES_BACK_AS_FREED true
#else
#define COMES_BACK_AS_FREED false
#endif

void page_reporting_put_block(struct page *page, unsigned int order)
{
	unsigned int step = min(order, pageblock_order);

	for (unsigned long i = 0; i < 1UL << order; i++) {
		struct page *one = pfn_to_page(page->pfn + i);

		must(one->state == PAGE_LENT, "page %#lx comes back, but was not lent", one->pfn);
		must(!one->in_flight, "page %#lx comes back before the device is done", one->pfn);
	}
	for (unsigned long i = 0; i < 1UL << order; i += 1UL << step)
		free_block(page->pfn + i, step, COMES_BACK_AS_FREED, true);
	/* Isolated meanwhile in part, it merges later, and that counts as a free. */
	for (unsigned long i = 0; i < 1UL << order; i += 1UL << step)
		if (memory_is_isolated(page->pfn + i))
			host_doubts(page->pfn, 1UL << order);
}

unsigned long memory_lent_pages(void)
{
	unsigned long count = 0;

	for (int i = 0; i < SECTIONS; i++)
		for (unsigned long n = 0; sections[i].usage && n < PAGES_PER_SECTION; n++)
			count += sections[i].pages[n].state == PAGE_LENT;
	return count;
}

/* ---- Programs ---- */

static void hold(unsigned long pfn, unsigned int order)
{
	if (used_count == used_max) {
		used_max = 2 * used_max + 64;
		used = realloc(used, used_max * sizeof(*used));
	}
	used[used_count].pfn = pfn;
	used[used_count++].order = order;
}

/* Allocates a block of a random order, often of the smallest. */
bool memory_alloc(void)
{
	struct zone *zone = &zones[chance(ARRAY_SIZE(zones))];
	unsigned int order = one_in(2) ? 0 : chance(MAX_PAGE_ORDER + 1);
	struct page *page = NULL;
	unsigned int from;

	spin_lock_irq(&zone->lock);
	for (from = order; from <= MAX_PAGE_ORDER && !page; from++) {
		struct list_head *list = &zone->free_area[from].list;
		struct page *candidate;

		list_for_each_entry(candidate, list, lru)
			if (!memory_is_isolated(candidate->pfn)) {
				page = candidate;
				break;
			}
	}
	if (page) {
		unsigned int size = page->order;
		unsigned long pfn = page->pfn;
		/* expand(): the remainder stays reported. */
		bool reported = page->reported && KEEPS_REPORTED;

		unlist_block(page);
		while (size > order) {
			size--;
			/* Either half may be allocated. */
			unsigned long rest = pfn;

			if (one_in(2))
				pfn += 1UL << size;
			else
				rest += 1UL << size;
			list_block(pfn_to_page(rest), size, false);
			pfn_to_page(rest)->reported = reported;
		}
		set_state(pfn, order, PAGE_USED);
		pfn_to_page(pfn)->order = order;
		host_sees_change(pfn, order);
		hold(pfn, order);
	}
	spin_unlock_irq(&zone->lock);
	return page;
}

static void free_used(unsigned long index)
{
	unsigned long pfn = used[index].pfn;
	unsigned int order = used[index].order;
	struct zone *zone = pfn_to_page(pfn)->zone;
	bool tail = one_in(4);

	used[index] = used[--used_count];
	spin_lock_irq(&zone->lock);
	free_block(pfn, order, true, tail);
	spin_unlock_irq(&zone->lock);
}

bool memory_free(void)
{
	if (used_count)
		free_used(chance(used_count));
	return used_count;
}

void memory_free_all(void)
{
	while (used_count)
		free_used(used_count - 1);
}

/* ---- Isolation and hotplug ---- */

/* The free block that covers a page, if any. */
static struct page *block_of(unsigned long pfn)
{
	for (unsigned int order = 0; order <= MAX_PAGE_ORDER; order++) {
		struct page *page = pfn_to_page(round_down(pfn, 1UL << order));

		if (page->buddy && page->pfn + (1UL << page->order) > pfn)
			return page;
	}
	return NULL;
}

/* move_freepages_block_isolate(): a larger block is split. */
static void set_isolated(unsigned long pfn, bool value)
{
	unsigned long first = round_down(pfn, 1UL << PAGEBLOCK_ORDER);
	struct zone *zone = pfn_to_page(first)->zone;
	struct page *block;

	/* As prep_move_freepages_block(): skips a pageblock of two zones. */
	if (zone_of(first + (1UL << PAGEBLOCK_ORDER) - 1) != zone)
		return;
	spin_lock_irq(&zone->lock);
	if (memory_is_isolated(first) == value) {
		spin_unlock_irq(&zone->lock);
		return;
	}
	block = block_of(first);
	if (block && block->order > PAGEBLOCK_ORDER) {
		unsigned long head = block->pfn, size = 1UL << block->order;

		unlist_block(block);
		/* The kernel frees the parts, and they count as freed. */
		host_doubts(head, size);
		*isolated_flag(first) = value;
		for (unsigned long i = 0; i < size; i += 1UL << PAGEBLOCK_ORDER)
			free_block(head + i, PAGEBLOCK_ORDER, true, false);
	} else {
		/* Free blocks only change lists, and no longer count. */
		for (unsigned long i = 0; i < 1UL << PAGEBLOCK_ORDER; i++) {
			struct page *page = pfn_to_page(first + i);

			if (page->buddy)
				zone->free_pages += value ? -(1UL << page->order)
							  : 1UL << page->order;
		}
		*isolated_flag(first) = value;
		/* unset_migratetype_isolate(): blocks that may merge now do. */
		block = value ? NULL : pfn_to_page(first);
		if (block && block->buddy && block->order == PAGEBLOCK_ORDER &&
		    PAGEBLOCK_ORDER < MAX_PAGE_ORDER) {
			unlist_block(block);
			/* A block too small to be recorded may become part of a larger one. */
			free_block(first, PAGEBLOCK_ORDER, PAGEBLOCK_ORDER < page_reporting_order,
				   true);
		}
	}
	spin_unlock_irq(&zone->lock);
}

void memory_isolate(unsigned long pfn)
{
	set_isolated(pfn, true);
}

void memory_unisolate(unsigned long pfn)
{
	set_isolated(pfn, false);
}

static void isolate_section(unsigned long start, bool value)
{
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i += 1UL << PAGEBLOCK_ORDER)
		set_isolated(start + i, value);
}

/* offline_pages() and then arch_remove_memory(): fails while pages are lent. */
bool memory_offline(unsigned int index)
{
	struct mem_section *section = &sections[index];
	unsigned long nr = section_numbers[index];
	unsigned long start = section_nr_to_pfn(nr);

	if (!section->online || prb_index.index_lock.held)
		return false;
	isolate_section(start, true);
	/* Memory in use is migrated elsewhere. */
	for (unsigned long i = used_count; i-- > 0;)
		if (i < used_count && pfn_to_section_nr(used[i].pfn) == nr)
			free_used(i);
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i++)
		if (section->pages[i].state != PAGE_FREE) {
			isolate_section(start, false);
			return false;
		}
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i++) {
		struct page *page = &section->pages[i];

		if (page->buddy)
			unlist_block(page);
		page->state = PAGE_OFFLINE;
		/* Its bits are dropped. Without tracking, it comes online without an age. */
		page->freed_in = 0;
	}
	section->online = false;
	if (tracking || prb_index.chunks) {
		mutex_lock(&prb_index.index_lock);
		prb_forget_section(nr);
		mutex_unlock(&prb_index.index_lock);
	}
	must(!atomic_long_read(&section->usage->reporting_young) && !section->usage->reporting_old,
	     "bits of section %lu outlive it", nr);
	host_forgets(nr);
	if (one_in(2)) {
		free(section->usage);
		free(section->pages);
		*section = (struct mem_section){};
	}
	return true;
}

static void add_section(unsigned int index)
{
	struct mem_section *section = &sections[index];
	unsigned long start = section_nr_to_pfn(section_numbers[index]);

	section->usage = calloc(1, sizeof(*section->usage));
	section->pages = calloc(PAGES_PER_SECTION, sizeof(*section->pages));
	for (unsigned long i = 0; i < PAGES_PER_SECTION; i++) {
		section->pages[i].pfn = start + i;
		section->pages[i].zone = zone_of(start + i);
	}
}

static void free_section(unsigned int index)
{
	unsigned long pfn = section_nr_to_pfn(section_numbers[index]);
	unsigned long end = pfn + PAGES_PER_SECTION;
	unsigned int order;

	for (; pfn < end; pfn += 1UL << order) {
		struct zone *zone = zone_of(pfn);

		order = MAX_PAGE_ORDER;
		while (pfn & ((1UL << order) - 1) || zone_of(pfn + (1UL << order) - 1) != zone)
			order--;
		spin_lock_irq(&zone->lock);
		free_block(pfn, order, true, true);
		spin_unlock_irq(&zone->lock);
	}
}

/* online_pages() */
void memory_online(unsigned int index)
{
	struct mem_section *section = &sections[index];
	unsigned long nr = section_numbers[index];

	if (section->online || prb_index.index_lock.held)
		return;
	if (!section->usage)
		add_section(index);
	for (unsigned long i = 0; i < PAGES_PER_SECTION >> PAGEBLOCK_ORDER; i++)
		isolated[index][i] = true;
	free_section(index);
	section->online = true;
	isolate_section(section_nr_to_pfn(nr), false);
	if (prb_index.chunks) {
		mutex_lock(&prb_index.index_lock);
		memory_is_scarce = one_in(2);
		prb_online_section(nr);
		memory_is_scarce = false;
		mutex_unlock(&prb_index.index_lock);
	}
	host_forgets(nr);
}

void memory_init(void)
{
	for (unsigned int i = 0; i < ARRAY_SIZE(zones); i++)
		for (int order = 0; order <= MAX_PAGE_ORDER; order++)
			INIT_LIST_HEAD(&zones[i].free_area[order].list);
	for (unsigned int i = 0; i < FIRST_HOTPLUGGED; i++)
		add_section(i);
	for (unsigned int i = 0; i < FIRST_HOTPLUGGED; i++) {
		free_section(i);
		sections[i].online = true;
	}
	for (unsigned int i = 0; i < ARRAY_SIZE(zones); i++) {
		zones[i].low_pages = zones[i].free_pages / 16;
		zones[i].high_pages = zones[i].free_pages / 8;
	}
}
