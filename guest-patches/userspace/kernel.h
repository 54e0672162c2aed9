/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The parts of a kernel that the core of the bitmap tracker needs.
 *
 * One thread simulates all processors: wherever another processor could run on a
 * real machine (an unlock, an atomic operation, the device at work),
 * others_run() executes some of their work.
 */
#ifndef KERNEL_H
#define KERNEL_H

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t u64;
typedef int64_t s64;
typedef unsigned int gfp_t;

/* ---- Ends the test, naming its seed ---- */

_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define must(cond, ...) do { if (!(cond)) fail(__VA_ARGS__); } while (0)
#define WARN_ON_ONCE(cond) ({ bool c_ = (cond); must(!c_, "the core warns: " #cond); c_; })
#define VM_WARN_ON_ONCE WARN_ON_ONCE
#define WARN_ON WARN_ON_ONCE

/* ---- Arithmetic ---- */

#define BITS_PER_LONG		64
#define BIT(n)			(1UL << (n))
#define GENMASK(h, l)		((~0UL << (l)) & (~0UL >> (BITS_PER_LONG - 1 - (h))))
#define round_down(x, y)	((x) & ~((__typeof__(x))(y) - 1))
#define DIV_ROUND_UP(n, d)	(((n) + (d) - 1) / (d))
#define min(a, b)		({ __typeof__(a) a_ = (a); __typeof__(b) b_ = (b); a_ < b_ ? a_ : b_; })
#define max(a, b)		({ __typeof__(a) a_ = (a); __typeof__(b) b_ = (b); a_ > b_ ? a_ : b_; })
#define MIN(a, b)		((a) < (b) ? (a) : (b))
#define min_t(t, a, b)		min((t)(a), (t)(b))
#define max_t(t, a, b)		max((t)(a), (t)(b))
#define clamp(v, lo, hi)	min(max(v, lo), hi)
#define __ffs(w)		((unsigned long)__builtin_ctzl(w))
#define __fls(w)		((unsigned long)(BITS_PER_LONG - 1 - __builtin_clzl(w)))
#define hweight_long(w)		((unsigned long)__builtin_popcountl(w))
#define mul_u64_u32_div(a, b, c) ((u64)((unsigned __int128)(a) * (b) / (c)))
#define SZ_1M			0x100000UL
#define S64_MAX			INT64_MAX
#define ARRAY_SIZE(a)		(sizeof(a) / sizeof((a)[0]))

/* Repeatable chance: trace.c. */
unsigned long chance(unsigned long below);
#define one_in(n) (!chance(n))

/* ---- Memory order, locks, other processors ---- */

void others_run(void);

#define READ_ONCE(x)		(*(volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v)	(*(volatile __typeof__(x) *)&(x) = (v))
#define smp_mb()		others_run()
#define smp_mb__after_atomic()	others_run()
#define smp_mb__before_atomic()	others_run()
#define cond_resched()		others_run()
#define ____cacheline_aligned_in_smp

struct mutex { bool held; };
typedef struct { bool held; } spinlock_t;

#define __MUTEX_INITIALIZER(name) { false }
#define lockdep_assert_held(l)	must((l)->held, "not held: " #l)

static inline void mutex_lock(struct mutex *lock)
{
	must(!lock->held, "a mutex is taken twice");
	others_run();
	lock->held = true;
}

static inline void mutex_unlock(struct mutex *lock)
{
	must(lock->held, "a mutex is not held");
	lock->held = false;
	others_run();
}

/* The held lock: a processor holds one zone's lock at a time. */
extern spinlock_t *zone_lock_held;

static inline void spin_lock_irq(spinlock_t *lock)
{
	must(!zone_lock_held, "a zone lock is taken under another");
	others_run();
	lock->held = true;
	zone_lock_held = lock;
}

static inline void spin_unlock_irq(spinlock_t *lock)
{
	must(zone_lock_held == lock, "another zone lock is held");
	lock->held = false;
	zone_lock_held = NULL;
	others_run();
}

#define spin_lock_irqsave(lock, flags)		((void)((flags) = 0), spin_lock_irq(lock))
#define spin_unlock_irqrestore(lock, flags)	((void)(flags), spin_unlock_irq(lock))

typedef struct { int counter; } atomic_t;

#define atomic_read(v)		((v)->counter)
#define atomic_set(v, value)	((void)((v)->counter = (value)))
#define atomic_inc(v)		((void)(v)->counter++)
#define atomic_dec(v)		((void)(v)->counter--)

typedef struct { long counter; } atomic_long_t;

static inline long atomic_long_read(const atomic_long_t *v)
{
	return v->counter;
}

static inline void atomic_long_set(atomic_long_t *v, long value)
{
	v->counter = value;
}

static inline long atomic_long_add_return(long more, atomic_long_t *v)
{
	others_run();
	return v->counter += more;
}

#define atomic_long_add(more, v)	((void)atomic_long_add_return(more, v))
#define atomic_long_sub(less, v)	((void)atomic_long_add_return(-(long)(less), v))
#define atomic_long_inc(v)		atomic_long_add(1, v)

static inline long atomic_long_xchg(atomic_long_t *v, long value)
{
	long old;

	others_run();
	old = v->counter;
	v->counter = value;
	others_run();
	return old;
}

static inline long atomic_long_fetch_andnot(unsigned long mask, atomic_long_t *v)
{
	long old;

	others_run();
	old = v->counter;
	v->counter &= ~mask;
	return old;
}

static inline long atomic_long_fetch_or(unsigned long mask, atomic_long_t *v)
{
	unsigned long old = v->counter;

#ifdef BUG_LOST
	/* Planted: the last granule of a free is not recorded. */
	old |= mask & ~(mask - 1);
	mask &= mask - 1;
#endif
	v->counter |= mask;
	return old;
}

#define set_bit(n, w)	((void)((w)[(n) / BITS_PER_LONG] |= BIT((n) % BITS_PER_LONG)))
#define clear_bit(n, w)	((void)((w)[(n) / BITS_PER_LONG] &= ~BIT((n) % BITS_PER_LONG)))
#define __set_bit set_bit
#define test_bit(n, w)	((bool)((w)[(n) / BITS_PER_LONG] & BIT((n) % BITS_PER_LONG)))

#define DECLARE_BITMAP(name, bits)	unsigned long name[DIV_ROUND_UP(bits, BITS_PER_LONG)]
#define bitmap_zero(words, bits)	\
	memset(words, 0, DIV_ROUND_UP(bits, BITS_PER_LONG) * sizeof(long))

static inline unsigned long find_next_bit(const unsigned long *words, unsigned long size,
					  unsigned long from)
{
	for (; from < size; from++) {
		unsigned long word = words[from / BITS_PER_LONG] >> (from % BITS_PER_LONG);

		if (word) {
			from += __ffs(word);
			return from < size ? from : size;
		}
		from |= BITS_PER_LONG - 1;
	}
	return size;
}

#define for_each_set_bit(bit, words, size)			\
	for ((bit) = find_next_bit(words, size, 0); (bit) < (size);	\
	     (bit) = find_next_bit(words, size, (bit) + 1))

/* ---- Time and observers ---- */

#define local_clock()		((u64)jiffies * (1000000000 / HZ))
#define sched_clock		local_clock
#define count_vm_event(item)	((void)0)
#define count_vm_events(item, n) ((void)(n))
#define trace_page_reporting_pass(...)		((void)0)
#define trace_page_reporting_batch_send(...)	((void)0)
#define trace_page_reporting_batch_done(...)	((void)0)

#define HZ 250UL
extern unsigned long jiffies;
#define jiffies_to_msecs(j)	((unsigned int)((j) * 1000 / HZ))
#define msecs_to_jiffies(m)	((unsigned long)(m) * HZ / 1000)
#define time_after(a, b)	((long)((b) - (a)) < 0)
#define time_before(a, b)	time_after(b, a)

/* ---- Lists ---- */

struct list_head { struct list_head *next, *prev; };

#define LIST_HEAD_INIT(name)	{ &(name), &(name) }

static inline void INIT_LIST_HEAD(struct list_head *list)
{
	list->next = list->prev = list;
}

static inline void list_add_between(struct list_head *item, struct list_head *prev,
				    struct list_head *next)
{
	item->prev = prev;
	item->next = next;
	prev->next = next->prev = item;
}

#define list_add(item, list)		list_add_between(item, list, (list)->next)
#define list_add_tail(item, list)	list_add_between(item, (list)->prev, list)

static inline void list_del(struct list_head *item)
{
	item->prev->next = item->next;
	item->next->prev = item->prev;
	item->next = item->prev = NULL;
}

#define list_empty(list)	((list)->next == (list))
#define container_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))
#define list_entry		container_of
#define list_first_entry(list, type, member)	list_entry((list)->next, type, member)
#define list_first_entry_or_null(list, type, member) \
	(list_empty(list) ? NULL : list_first_entry(list, type, member))
#define list_for_each_entry(pos, list, member)				\
	for (pos = list_first_entry(list, __typeof__(*pos), member);	\
	     &pos->member != (list);					\
	     pos = list_entry(pos->member.next, __typeof__(*pos), member))
#define list_for_each_entry_safe(pos, n, list, member)			\
	for (pos = list_first_entry(list, __typeof__(*pos), member),	\
	     n = list_entry(pos->member.next, __typeof__(*pos), member);	\
	     &pos->member != (list);					\
	     pos = n, n = list_entry(n->member.next, __typeof__(*n), member))

/* ---- Kernel memory ---- */

#define GFP_KERNEL 0
#define PAGE_SHIFT 12
#define kzalloc(size, gfp)	calloc(1, size)
#define kcalloc(n, size, gfp)	calloc(n, size)
#define kvcalloc		kcalloc
#define kfree			free
#define kvfree			free
/* No page can be allocated. */
extern bool memory_is_scarce;
#define get_zeroed_page(gfp)	\
	(memory_is_scarce ? 0 : (unsigned long)calloc(1, 1UL << PAGE_SHIFT))
#define struct_size(p, member, count) \
	(sizeof(*(p)) + sizeof(*(p)->member) * (count))

/* ---- Zones, sections, pages: memory.c ---- */

/* The proportions matter, not the sizes; two geometries are tested. */
#ifndef SECTION_ORDER
#define SECTION_ORDER	12
#define BLOCK_ORDER_MAX	7
#define PAGEBLOCK_ORDER	6
#endif

#define PFN_SECTION_SHIFT	SECTION_ORDER
#define PAGES_PER_SECTION	(1UL << PFN_SECTION_SHIFT)
#define MAX_PAGE_ORDER		BLOCK_ORDER_MAX
#define NR_PAGE_ORDERS		(MAX_PAGE_ORDER + 1)
#define pageblock_order		((unsigned int)PAGEBLOCK_ORDER)
#define NR_MEM_SECTIONS		(1UL << 17)

struct zone {
	spinlock_t lock;
	unsigned long free_pages;
	unsigned long low_pages;
	unsigned long high_pages;
	struct free_area {
		struct list_head list;
		unsigned long nr_free;
	} free_area[NR_PAGE_ORDERS];
};

#define MAX_NUMNODES 1
#define MAX_NR_ZONES 3
extern struct zone zones[MAX_NR_ZONES];
#define zone_idx(zone)		((unsigned long)((zone) - zones))
#define zone_to_nid(zone)	0UL

struct page {
	unsigned long pfn;
	struct zone *zone;
	struct list_head lru;
	unsigned long private;
	/* As in the kernel, on the first page of a free block. */
	bool buddy;
	bool reported;
	unsigned int order;
	/* The model's records. */
	enum { PAGE_OFFLINE, PAGE_USED, PAGE_FREE, PAGE_LENT } state;
	bool told;		/* reported to the host as free */
	bool news;		/* its granule has changed since then */
	bool in_flight;		/* the device works on it */
	/* Its last free that left a reportable block: passes begun, and whether in one. */
	unsigned long freed_in;
	bool freed_in_pass;
};

struct mem_section_usage {
	atomic_long_t reporting_young;
	unsigned long reporting_old;
};

struct mem_section {
	struct mem_section_usage *usage;
	struct page *pages;
	bool online;
};

struct mem_section *__nr_to_section(unsigned long nr);
unsigned long next_present_section_nr(unsigned long nr);

#define pfn_to_section_nr(pfn)	((pfn) >> PFN_SECTION_SHIFT)
#define section_nr_to_pfn(nr)	((nr) << PFN_SECTION_SHIFT)

static inline bool online_section_nr(unsigned long nr)
{
	struct mem_section *section = __nr_to_section(nr);

	return section && section->online;
}

static inline struct page *pfn_to_page(unsigned long pfn)
{
	struct mem_section *section = __nr_to_section(pfn_to_section_nr(pfn));

	must(section, "the core looks at page %#lx, which is in a hole", pfn);
	return &section->pages[pfn & (PAGES_PER_SECTION - 1)];
}

static inline struct page *pfn_to_online_page(unsigned long pfn)
{
	return online_section_nr(pfn_to_section_nr(pfn)) ? pfn_to_page(pfn) : NULL;
}

#define page_to_pfn(page)		((page)->pfn)
#ifdef BUG_ZONE
/* Planted: all of a granule seems to be in the zone of its first page. */
#define page_zone(page) \
	(pfn_to_page(round_down((page)->pfn, 1UL << (PFN_SECTION_SHIFT - 6)))->zone)
#else
#define page_zone(page)			((page)->zone)
#endif
#define page_private(page)		((page)->private)
#define set_page_private(page, v)	((void)((page)->private = (v)))
#define __SetPageReported(page)		((void)((page)->reported = true))
#define __ClearPageReported(page)	((void)((page)->reported = false))
#ifdef BUG_IN_USE
/* Planted: an allocated block still looks free. */
#define PageBuddy(page)			((page)->buddy || (page)->state == PAGE_USED)
#else
#define PageBuddy(page)			((page)->buddy)
#endif
#define PageReported(page)		((page)->reported)

static inline unsigned int buddy_order(const struct page *page)
{
	must(page->zone->lock.held, "the order of page %#lx is read without its zone's lock", page->pfn);
	return page->order;
}

/* Without the lock it may be anything by now. */
static inline unsigned int buddy_order_unsafe(const struct page *page)
{
	return page->zone->lock.held || chance(8) ? page->order : chance(1000);
}

#define ALLOC_CMA 0
#define low_wmark_pages(zone)		((zone)->low_pages)
#define high_wmark_pages(zone)		((zone)->high_pages)
#define zone_page_state(zone, item)	((zone)->free_pages)
#define zone_watermark_ok(zone, order, mark, index, flags) \
	((zone)->free_pages > (mark))

extern unsigned int page_reporting_order;
bool page_reporting_take_block(struct page *page, unsigned int order);
void page_reporting_put_block(struct page *page, unsigned int order);

/* ---- The device: host.c ---- */

struct scatterlist {
	struct page *page;
	unsigned int length;
	bool end;
};

#define sg_page(sg)	((sg)->page)
#define sg_mark_end(sg)	((void)((sg)->end = true))

static inline void sg_init_table(struct scatterlist *sg, unsigned int count)
{
	for (unsigned int i = 0; i < count; i++)
		sg[i] = (struct scatterlist){};
}

static inline void sg_set_page(struct scatterlist *sg, struct page *page, unsigned int length,
			       unsigned int offset)
{
	must(!offset, "an entry starts inside a page");
	sg->page = page;
	sg->length = length;
}

#define PAGE_REPORTING_CAPACITY 32

struct page_reporting_dev_info {
	int (*report)(struct page_reporting_dev_info *prdev, struct scatterlist *sg,
		      unsigned int nents);
	int (*submit)(struct page_reporting_dev_info *prdev, struct scatterlist *sg,
		      unsigned int nents, void *token);
	void *(*reap)(struct page_reporting_dev_info *prdev, bool wait);
	bool any_length;
	unsigned int entries;
	unsigned int batches;
	unsigned int order;
};

#define prb_capacity(prdev)	PAGE_REPORTING_CAPACITY

#endif /* KERNEL_H */
