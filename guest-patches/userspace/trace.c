// SPDX-License-Identifier: GPL-2.0
/*
 * Random traces of all operations on memory, between and during passes of the
 * core: no free memory is lost, none in use is reported, and none is reported
 * twice without a change. model.h lists the parts.
 *
 *	trace SEED STEPS	prints counts, or the violation
 */
#include <stdarg.h>

#include "model.h"

static unsigned long seed, state, step;
/* Processors that may run whenever another one could; 0 for none. */
static unsigned int depth, eagerness;
static unsigned long counts[16], reported_pages;

_Noreturn void fail(const char *format, ...)
{
	va_list args;

	fprintf(stderr, "FAIL seed %lu, step %lu: ", seed, step);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, "\n");
	exit(1);
}

/* xorshift64* */
unsigned long chance(unsigned long below)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return (state * 2685821657736338717UL >> 33) % below;
}

static unsigned long random_pfn(void)
{
	unsigned long nr;

	do
		nr = section_numbers[chance(SECTIONS)];
	while (!online_section_nr(nr));
	return section_nr_to_pfn(nr) + chance(PAGES_PER_SECTION);
}

/* Pageblocks isolated by the trace itself, to be released later. */
static unsigned long alone[4];
/* One at a time, and no section goes offline meanwhile, as with mem_hotplug_lock. */
static bool busy;

static void isolate(void)
{
	unsigned long *slot = &alone[chance(ARRAY_SIZE(alone))];

	if (busy)
		return;
	busy = true;
	if (*slot) {
		if (online_section_nr(pfn_to_section_nr(*slot)))
			memory_unisolate(*slot);
		*slot = 0;
	} else {
		*slot = random_pfn() | 1;
		memory_isolate(*slot);
	}
	busy = false;
}

static void hotplug(void)
{
	unsigned int index = FIRST_HOTPLUGGED + chance(SECTIONS - FIRST_HOTPLUGGED);

	if (busy)
		return;
	busy = true;
	if (online_section_nr(section_numbers[index]))
		counts[5] += memory_offline(index);
	else
		memory_online(index);
	busy = false;
}

/* Actions of other processors at any time. */
static void ordinary(void)
{
	/* Phases of growth and of shrinking. */
	unsigned long grow = step / 512 % 4;

	if (chance(4) < grow)
		counts[0] += memory_alloc();
	else
		counts[1] += memory_free();
}

void others_run(void)
{
	if (depth || zone_lock_held || !eagerness || chance(eagerness))
		return;
	depth++;
	for (unsigned long n = 1 + chance(4); n; n--)
		ordinary();
	if (one_in(16))
		isolate();
	if (one_in(32) && !prb_index.index_lock.held)
		hotplug();
	if (in_pass && one_in(8))
		atomic_set(&prb_index.stop, one_in(4));
	depth--;
}

struct prb_result pass(unsigned int flags)
{
	struct prb_result result;

	mutex_lock(&prb_index.pass_lock);
	passes++;
	in_pass = true;
	minds_age = !(flags & PRB_ANY_AGE);
#ifndef CORE_ALONE
	prb_note_reuse(one_in(8) ? chance(1UL << 16) : 0);
	/* As the worker does. */
	if (!flags && prb_hold(16, 2000))
		flags = PRB_AGE_ONLY;
#endif
	result = prb_pass(flags);
	reported_pages += result.pages;
	in_pass = false;
	atomic_set(&prb_index.stop, 0);
	mutex_unlock(&prb_index.pass_lock);
	counts[2]++;
	return result;
}

void attach(void)
{
	host_init(one_in(2), 1 + chance(PRB_BATCH_ENTRIES_MAX), 1 + chance(PRB_BATCHES_MAX));
	mutex_lock(&prb_index.pass_lock);
	must(!prb_attach(&device), "the core does not attach");
	mutex_unlock(&prb_index.pass_lock);
	tracking = true;
}

void detach(void)
{
	tracking = false;
	mutex_lock(&prb_index.pass_lock);
	prb_detach();
	mutex_unlock(&prb_index.pass_lock);
	depth++;
	for (unsigned int n = 0; n < 20; n++)
		ordinary();
	depth--;
}

#ifndef CORE_ALONE
/* As mm/page_reporting_worker.c does. */
static void set_order(void)
{
	mutex_lock(&prb_index.pass_lock);
	prb_set_order(2 + chance(MAX_PAGE_ORDER - 1));
	mutex_unlock(&prb_index.pass_lock);
	/* The core does not know which blocks were split since. */
	host_doubts_all();
}

static void report_again(void)
{
	eagerness = 0;
	mutex_lock(&prb_index.pass_lock);
	prb_unreport_all();
	mutex_unlock(&prb_index.pass_lock);
	host_forgets_all();
}

static void set_rate(void)
{
	prb_index.bytes_per_second = one_in(2) ? 0 : 1 + chance(1UL << 24);
}

/* Features of the second series. */
static void change_settings(unsigned long what)
{
	if (what < 10)
		set_rate();
	else if (what < 20)
		prb_pending_pages(NULL);
	else if (what < 24)
		set_order();
	else
		report_again();
}
#else
static void change_settings(unsigned long what)
{
}
#endif

static void act(void)
{
	unsigned long what = chance(1000);

	eagerness = one_in(4) ? 0 : 2 + chance(40);
	jiffies += chance(HZ / 4);
	if (what < 800)
		ordinary();
	else if (what < 900)
		pass(one_in(4) ? PRB_ANY_AGE | PRB_ANY_RATE : 0);
	else if (what < 930)
		isolate();
	else if (what < 960)
		hotplug();
	else if (what < 970)
		host_set_failing(one_in(4));
	else if (what < 997)
		change_settings(what - 970);
	else
		detach(), attach();
	eagerness = 0;
}

/* Without disturbance, all free memory is reported. */
static void settle(bool free_all)
{
	eagerness = 0;
	host_set_failing(false);
	for (unsigned int i = 0; i < ARRAY_SIZE(alone); i++) {
		if (alone[i] && online_section_nr(pfn_to_section_nr(alone[i])))
			memory_unisolate(alone[i]);
		alone[i] = 0;
	}
	if (free_all)
		memory_free_all();
	pass(PRB_ANY_AGE | PRB_ANY_RATE);
	pass(PRB_ANY_AGE | PRB_ANY_RATE);
	check_all();
	check_all_told();
	counts[4]++;
}

int main(int argc, char **argv)
{
	unsigned long steps;

	if (argc != 3) {
		fprintf(stderr, "usage: trace SEED STEPS\n");
		return 2;
	}
	seed = strtoul(argv[1], NULL, 0);
	steps = strtoul(argv[2], NULL, 0);
	state = (seed + 1) * 0x9e3779b97f4a7c15UL;
	memory_init();
	attach();
	check_lending();
#ifndef CORE_ALONE
	check_bursts();
	check_rates();
#endif
	check_ages();
	for (step = 1; step <= steps; step++) {
		act();
		if (one_in(16))
			check_all(), counts[3]++;
		if (one_in(1024))
			settle(one_in(2));
	}
	settle(true);
	printf("seed %lu: %lu allocations, %lu frees, %lu passes, %lu sections gone, "
	       "%lu pages reported, %lu checks, settled %lu times\n",
	       seed, counts[0], counts[1], counts[2], counts[5],
	       reported_pages, counts[3], counts[4]);
	return 0;
}
