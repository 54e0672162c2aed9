/* From the PVH entry point (32-bit, paging off, ebx = start_info) to 64-bit Rust.
 * Identity-maps the first 4 GiB with 2 MiB pages; devices are moved below that. */

.section .note.pvh, "a", @note
    .balign 4
    .long 4                     /* name size */
    .long 4                     /* descriptor size */
    .long 18                    /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_entry

.section .text.boot, "ax"
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
    movl $stack_top, %esp
    movl %ebx, %esi

    /* page directories: 2048 entries of 2 MiB, present | writable | large */
    movl $page_directories, %edi
    movl $0x83, %eax
    movl $2048, %ecx
1:  movl %eax, (%edi)
    movl $0, 4(%edi)
    addl $0x200000, %eax
    addl $8, %edi
    loop 1b

    movl $page_directories + 3, %eax
    movl $pdpt, %edi
    movl $4, %ecx
2:  movl %eax, (%edi)
    addl $4096, %eax
    addl $8, %edi
    loop 2b

    movl $pdpt + 3, %eax
    movl %eax, pml4

    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x20, %eax             /* PAE */
    movl %eax, %cr4
    movl $0xc0000080, %ecx      /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000001, %eax       /* PG | PE */
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $0x8, $long_mode

.code64
long_mode:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movq $stack_top, %rsp
    movl %esi, %edi
    call guest_main
3:  hlt
    jmp 3b

/* Every interrupt and exception ends here: one counter a vector. */
.global interrupt_stubs
.balign 16
interrupt_stubs:
.set vector, 0
.rept 64
    .balign 16
    pushq $vector
    jmp interrupt_common
    .set vector, vector + 1
.endr

interrupt_common:
    pushq %rax
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    movq 72(%rsp), %rdi
    movq 80(%rsp), %rsi
    call on_interrupt
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rax
    addq $8, %rsp
    iretq

.section .rodata
.balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    /* 64-bit code */
    .quad 0x00cf93000000ffff    /* data */
gdt_pointer:
    .word 23
    .long gdt

.section .bss
.balign 4096
.global page_directories
page_directories: .skip 4 * 4096
pdpt: .skip 4096
pml4: .skip 4096
    .skip 65536
stack_top:
