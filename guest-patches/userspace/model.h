/* SPDX-License-Identifier: GPL-2.0 */
/* Shared declarations of the test's parts. */
#ifndef MODEL_H
#define MODEL_H

#include "kernel.h"
#include "page_reporting_bitmap.h"

/* The first series alone has no rates, one batch, and no flag on remainders. */
#ifdef CORE_ALONE
#define PRB_ANY_RATE 0
#define PRB_BATCH_ENTRIES_MAX PAGE_REPORTING_CAPACITY
#define PRB_BATCHES_MAX 1
#define KEEPS_REPORTED false
#else
#define KEEPS_REPORTED true
#endif

/* ---- memory.c: the allocator ---- */

#define SECTIONS 13

/* Numbers of the possible sections, ascending, with holes. */
extern const unsigned long section_numbers[SECTIONS];
/* Sections from this index on are hot-plugged and unplugged. */
#define FIRST_HOTPLUGGED 7

/* Whether frees are passed to the core. */
extern bool tracking;

void memory_init(void);
bool memory_alloc(void);
bool memory_free(void);
void memory_free_all(void);
void memory_isolate(unsigned long pfn);
void memory_unisolate(unsigned long pfn);
bool memory_offline(unsigned int index);
void memory_online(unsigned int index);
bool memory_is_isolated(unsigned long pfn);
unsigned long memory_lent_pages(void);
/* Whether the granule of a page begins in another zone, and it is in a block smaller than one. */
bool memory_is_out_of_reach(unsigned long pfn, unsigned int order);

/* ---- host.c: the host's records ---- */

extern struct page_reporting_dev_info device;
/* Passes begun so far, and whether one is in progress and respects ages. */
extern unsigned long passes;
extern bool in_pass, minds_age;

void host_init(bool queue, unsigned int capacity, unsigned int batches);
void host_forgets(unsigned long nr);
void host_forgets_all(void);
void host_doubts_all(void);
void host_doubts(unsigned long pfn, unsigned long pages);
void host_sees_change(unsigned long pfn, unsigned int order);
void host_sees_free(unsigned long pfn, unsigned int order);
bool host_is_failing(void);
void host_set_failing(bool failing);
unsigned long host_told_pages(void);

/* ---- trace.c ---- */

struct prb_result pass(unsigned int flags);
void attach(void);
void detach(void);

/* ---- ages.c: memory without an age ---- */

void check_ages(void);

/* ---- rates.c: limits of a pass ---- */

void check_rates(void);

/* ---- bursts.c: when a burst is held back ---- */

/* Bounds of the core: core.c. */
extern const unsigned long full_granules, worth_granules, lent_pages_min, lent_pages_max;
void check_bursts(void);

/* ---- lending.c: the limit on memory at the device ---- */

void check_lending(void);

/* ---- check.c: invariants ---- */

/* Whether the core knows of a section. */
bool is_covered(unsigned long nr);
void check_all(void);
void check_all_told(void);

#endif /* MODEL_H */
