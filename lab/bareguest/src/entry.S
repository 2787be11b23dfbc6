// How the CPUs get from where the firmware leaves them to C, and in and out of the kernel.
//
// Code at privilege level 0 runs in KVM's instruction emulator on some hosts, so it is short,
// and uses plain instructions.

#define STACK_SIZE 16384
#define TRAMPOLINE 0x8000
#define KERNEL_CODE 0x08
#define DATA 0x10
#define CODE32 0x28

	// The note by which QEMU knows a kernel that starts in 32-bit mode (PVH).
	.section .note.pvh, "a", @note
	.long 4, 4, 18
	.asciz "Xen"
	.long start

	.text
	.code32
	.globl start
start:
	cli
	mov %ebx, start_info
	lgdt gdt_pointer
	mov $DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	// 16 GiB of memory as it is, in pages of 2 MiB that user and kernel may write.
	mov $page_directories, %edi
	mov $0x87, %eax
	xor %edx, %edx
	mov $8192, %ecx
1:	mov %eax, (%edi)
	mov %edx, 4(%edi)
	add $0x200000, %eax
	adc $0, %edx
	add $8, %edi
	dec %ecx
	jnz 1b
	orl $0x18, page_directories + 0xfee00000 / 0x200000 * 8 // the APIC is not cached
	mov $page_directories + 7, %eax
	mov $page_pointers, %edi
	mov $16, %ecx
1:	mov %eax, (%edi)
	add $0x1000, %eax
	add $8, %edi
	dec %ecx
	jnz 1b
	movl $page_pointers + 7, page_root

long_mode:
	mov $0x620, %eax // PAE, OSFXSR, OSXMMEXCPT
	mov %eax, %cr4
	mov $page_root, %eax
	mov %eax, %cr3
	mov $0xc0000080, %ecx // EFER
	rdmsr
	or $0x100, %eax // LME
	wrmsr
	mov $0x80000013, %eax // PG, ET, MP, PE
	mov %eax, %cr0
	ljmp $KERNEL_CODE, $1f

	.code64
1:	mov $1, %edi
	lock xadd %edi, cpus_started
	mov %edi, %eax
	inc %eax
	imul $STACK_SIZE, %eax, %eax
	lea kernel_stacks(%rax), %rsp
	call cpu_main
2:	hlt
	jmp 2b

	// Other CPUs begin here, in real mode, in a copy at TRAMPOLINE.
	.code16
	.globl trampoline, trampoline_end
trampoline:
	cli
	xor %ax, %ax
	mov %ax, %ds
	lgdtl TRAMPOLINE + trampoline_gdt - trampoline
	mov $0x11, %eax
	mov %eax, %cr0
	ljmpl $CODE32, $TRAMPOLINE + 1f - trampoline
	.code32
1:	mov $DATA, %eax
	mov %eax, %ds
	mov %eax, %es
	mov %eax, %ss
	mov $long_mode, %eax
	jmp *%eax
	.align 4
trampoline_gdt:
	.word gdt_end - gdt - 1
	.long gdt
trampoline_end:

	.code64
	// enter_user(entry, stack, argument): goes to user code, with interrupts on.
	.globl enter_user
enter_user:
	mov %rdx, %rax
	pushq $0x1b // SS
	pushq %rsi
	pushq $0x202
	pushq $0x23 // CS
	pushq %rdi
	mov %rax, %rdi
	iretq

	// Every vector has a stub of 16 bytes that leads to kernel_entry with its number and
	// the error code on the stack.
	.globl stubs
	.align 16
stubs:
	.set vector, 0
	.rept 64
	.align 16
	.if (vector != 8) && (vector < 10 || vector > 14) && (vector != 17)
	pushq $0
	.endif
	pushq $vector
	jmp kernel_entry
	.set vector, vector + 1
	.endr

	.align 16
kernel_entry:
	push %rax
	push %rcx
	push %rdx
	push %rbx
	push %rbp
	push %rsi
	push %rdi
	push %r8
	push %r9
	push %r10
	push %r11
	push %r12
	push %r13
	push %r14
	push %r15
	mov %rsp, %rdi
	cld
	call kernel
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %r11
	pop %r10
	pop %r9
	pop %r8
	pop %rdi
	pop %rsi
	pop %rbp
	pop %rbx
	pop %rdx
	pop %rcx
	pop %rax
	add $16, %rsp
	iretq

	// call_kernel(number, a, b): from user code; see kernel.c. An invalid opcode is what
	// leads there on every host.
	.globl call_kernel
call_kernel:
	mov %rdi, %rax
	ud2
	ret

	.data
	.align 16
	.globl gdt, gdt_end
gdt:
	.quad 0
	.quad 0x00af9b000000ffff // kernel's code
	.quad 0x00cf93000000ffff // data
	.quad 0x00cff3000000ffff // user's data
	.quad 0x00affb000000ffff // user's code
	.quad 0x00cf9b000000ffff // 32-bit code
	.fill 8, 8, 0            // a TSS for each CPU
gdt_end:
gdt_pointer:
	.word gdt_end - gdt - 1
	.long gdt
	.globl start_info, cpus_started
start_info:
	.quad 0
cpus_started:
	.long 0

	.bss
	.align 4096
page_root:
	.skip 4096
page_pointers:
	.skip 4096
page_directories:
	.skip 16 * 4096
	.align STACK_SIZE
	.globl kernel_stacks
kernel_stacks:
	.skip 4 * STACK_SIZE

	.section .note.GNU-stack, "", @progbits
