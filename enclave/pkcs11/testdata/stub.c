/* A PKCS#11 module for the tests: it hands every call to a real module (REAL), but misbehaves where the file CONTROL says so. A line of the
 * file is a function, how often it misbehaves, and how:
 *
 *	C_Sign 1 segv           it dies
 *	C_Sign 1 hang           it never returns
 *	C_Sign 1 garbage        it answers nonsense and says that all is well
 *	C_Sign 3 rv b3          it returns this value, in hex
 *	C_GetTokenInfo 9 flags 40000
 *	                        it adds these flags, in hex
 *	C_OpenSession 9 most 4  there are no more sessions than these, in hex; the same for C_GetTokenInfo
 *
 * Calls of functions that may be named are counted in the file CONTROL.log, one line each. */
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "pkcs11go.h"

static CK_FUNCTION_LIST_PTR real;
static CK_FUNCTION_LIST list;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

enum { NOTHING, RETURN, GARBAGE, FLAGS, MOST };

static long opened;

/* act reads what a function is to do, and does what needs no arguments. */
static int act(const char *name, unsigned long *value)
{
	char function[64], how[16], line[256], rest[4096] = "";
	int result = NOTHING, hang = 0, segv = 0;
	unsigned times;

	pthread_mutex_lock(&lock);
	int log = open(CONTROL ".log", O_WRONLY | O_APPEND | O_CREAT, 0600);
	dprintf(log, "%s\n", name);
	close(log);
	FILE *f = fopen(CONTROL, "r");
	while (f && fgets(line, sizeof line, f)) {
		*value = 0;
		if (sscanf(line, "%63s %u %15s %lx", function, &times, how, value) < 3)
			continue;
		if (times > 0 && result == NOTHING && !hang && !segv && strcmp(function, name) == 0) {
			times--;
			hang = strcmp(how, "hang") == 0;
			segv = strcmp(how, "segv") == 0;
			if (strcmp(how, "rv") == 0)
				result = RETURN;
			if (strcmp(how, "garbage") == 0)
				result = GARBAGE;
			if (strcmp(how, "flags") == 0)
				result = FLAGS;
			if (strcmp(how, "most") == 0)
				result = MOST;
			unsigned long keep = *value;
			sprintf(rest + strlen(rest), "%s %u %s %lx\n", function, times, how, keep);
			char *tail = rest + strlen(rest);
			while (fgets(tail, (int)(rest + sizeof rest - tail), f))
				tail += strlen(tail);
			*value = keep;
			break;
		}
		strcat(rest, line);
	}
	if (f)
		fclose(f);
	if (result != NOTHING || hang || segv) {
		f = fopen(CONTROL, "w");
		fputs(rest, f);
		fclose(f);
	}
	pthread_mutex_unlock(&lock);
	if (segv)
		*(volatile int *)8 = 1;
	while (hang)
		pause();
	return result;
}

#define BEGIN(name) unsigned long value = 0; int what = act(#name, &value); if (what == RETURN) return value;

#define PASS(name, params, args) static CK_RV my_##name params { BEGIN(name) return real->name args; }

static void scribble(void *p, CK_ULONG n) { memset(p, 0xa5, n); }

#define OUT(name, params, args) static CK_RV my_##name params { BEGIN(name) CK_RV rv = real->name args; \
	if (what == GARBAGE && rv == CKR_OK && out) scribble(out, *n); return rv; }

PASS(C_Initialize, (CK_VOID_PTR a), (a))
PASS(C_Finalize, (CK_VOID_PTR a), ((opened = 0, a)))
PASS(C_Login, (CK_SESSION_HANDLE s, CK_USER_TYPE u, CK_UTF8CHAR_PTR p, CK_ULONG n), (s, u, p, n))
PASS(C_Logout, (CK_SESSION_HANDLE s), (s))
PASS(C_GetSessionInfo, (CK_SESSION_HANDLE s, CK_SESSION_INFO_PTR i), (s, i))
PASS(C_SignInit, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE k), (s, m, k))
PASS(C_EncryptInit, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE k), (s, m, k))
PASS(C_DecryptInit, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE k), (s, m, k))
PASS(C_FindObjectsInit, (CK_SESSION_HANDLE s, CK_ATTRIBUTE_PTR a, CK_ULONG n), (s, a, n))
PASS(C_GenerateKey, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR k), (s, m, a, n, k))
PASS(C_GenerateKeyPair, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_ATTRIBUTE_PTR b, CK_ULONG o,
	CK_OBJECT_HANDLE_PTR k, CK_OBJECT_HANDLE_PTR l), (s, m, a, n, b, o, k, l))
PASS(C_DeriveKey, (CK_SESSION_HANDLE s, CK_MECHANISM_PTR m, CK_OBJECT_HANDLE b, CK_ATTRIBUTE_PTR a, CK_ULONG n, CK_OBJECT_HANDLE_PTR k),
	(s, m, b, a, n, k))
OUT(C_Sign, (CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG l, CK_BYTE_PTR out, CK_ULONG_PTR n), (s, in, l, out, n))
OUT(C_Encrypt, (CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG l, CK_BYTE_PTR out, CK_ULONG_PTR n), (s, in, l, out, n))
OUT(C_Decrypt, (CK_SESSION_HANDLE s, CK_BYTE_PTR in, CK_ULONG l, CK_BYTE_PTR out, CK_ULONG_PTR n), (s, in, l, out, n))

static CK_RV my_C_OpenSession(CK_SLOT_ID i, CK_FLAGS f, CK_VOID_PTR p, CK_NOTIFY c, CK_SESSION_HANDLE_PTR h)
{
	BEGIN(C_OpenSession)
	if (__sync_add_and_fetch(&opened, 1) > (long)value && what == MOST) {
		__sync_sub_and_fetch(&opened, 1);
		return CKR_SESSION_COUNT;
	}
	CK_RV rv = real->C_OpenSession(i, f, p, c, h);
	if (rv != CKR_OK)
		__sync_sub_and_fetch(&opened, 1);
	return rv;
}

static CK_RV my_C_CloseSession(CK_SESSION_HANDLE s)
{
	BEGIN(C_CloseSession)
	__sync_sub_and_fetch(&opened, 1);
	return real->C_CloseSession(s);
}

static CK_RV my_C_GetSlotList(CK_BBOOL present, CK_SLOT_ID_PTR slots, CK_ULONG_PTR n)
{
	BEGIN(C_GetSlotList)
	CK_RV rv = real->C_GetSlotList(present, slots, n);
	if (what == GARBAGE && slots)
		scribble(slots, *n * sizeof *slots);
	return rv;
}

static CK_RV my_C_GetTokenInfo(CK_SLOT_ID slot, CK_TOKEN_INFO_PTR info)
{
	BEGIN(C_GetTokenInfo)
	CK_RV rv = real->C_GetTokenInfo(slot, info);
	if (what == GARBAGE)
		scribble(info, sizeof *info);
	if (what == FLAGS)
		info->flags |= value;
	if (what == MOST)
		info->ulMaxSessionCount = info->ulMaxRwSessionCount = value;
	return rv;
}

static CK_RV my_C_FindObjects(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE_PTR o, CK_ULONG max, CK_ULONG_PTR n)
{
	BEGIN(C_FindObjects)
	CK_RV rv = real->C_FindObjects(s, o, max, n);
	if (what == GARBAGE) {
		scribble(o, max * sizeof *o);
		*n = 1;
	}
	return rv;
}

static CK_RV my_C_GetAttributeValue(CK_SESSION_HANDLE s, CK_OBJECT_HANDLE o, CK_ATTRIBUTE_PTR a, CK_ULONG n)
{
	BEGIN(C_GetAttributeValue)
	CK_RV rv = real->C_GetAttributeValue(s, o, a, n);
	for (CK_ULONG i = 0; what == GARBAGE && i < n; i++)
		if (a[i].pValue)
			scribble(a[i].pValue, a[i].ulValueLen);
	return rv;
}

static CK_RV my_C_GetMechanismList(CK_SLOT_ID slot, CK_MECHANISM_TYPE_PTR m, CK_ULONG_PTR n)
{
	BEGIN(C_GetMechanismList)
	CK_RV rv = real->C_GetMechanismList(slot, m, n);
	if (what == GARBAGE && m)
		scribble(m, *n * sizeof *m);
	return rv;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST_PTR_PTR out)
{
	void *module = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
	if (!module)
		return CKR_GENERAL_ERROR;
	CK_C_GetFunctionList get = (CK_C_GetFunctionList)dlsym(module, "C_GetFunctionList");
	if (!get || get(&real) != CKR_OK)
		return CKR_GENERAL_ERROR;
	list = *real;
#define SET(name) list.name = my_##name;
	SET(C_Initialize) SET(C_Finalize) SET(C_OpenSession) SET(C_CloseSession) SET(C_Login) SET(C_Logout) SET(C_GetSessionInfo) SET(C_SignInit)
	SET(C_EncryptInit) SET(C_DecryptInit) SET(C_FindObjectsInit) SET(C_GenerateKey) SET(C_GenerateKeyPair) SET(C_DeriveKey) SET(C_Sign)
	SET(C_Encrypt) SET(C_Decrypt) SET(C_GetSlotList) SET(C_GetTokenInfo) SET(C_FindObjects) SET(C_GetAttributeValue)
	SET(C_GetMechanismList)
	*out = &list;
	return CKR_OK;
}
