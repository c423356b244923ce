package dmutex

import (
	"errors"
	"fmt"
)

var (
	// ErrNotHeld is matched by the error of an Unlock on a mutex that holds
	// nothing: it was never locked, or has been unlocked already.
	ErrNotHeld = errors.New("dmutex: lock is not held")

	// ErrLockLost is matched by the error of an Unlock or Extend whose hold had
	// ended before: its ttl ran out, or its key was deleted or taken over. Work done
	// under that hold may have overlapped with the next holder's. It is matched, too,
	// by the cause of a ctx that [Mutex.Do] ended.
	ErrLockLost = errors.New("dmutex: lock was lost before it was released")

	// ErrMaxHold is matched by the error of an Extend that would let a hold last for
	// longer than [WithMaxHold] allows, and by the cause of a ctx that [Mutex.Do]
	// ended because it had lasted for so long.
	ErrMaxHold = errors.New("dmutex: lock was held for as long as it may be")

	// ErrFateUnknown is matched by the error of a WaitUntilUnlocked that waits for a
	// hold which is gone, and was seen last so long ago that Redis has forgotten how
	// it ended (about 15 seconds): because Redis was out of reach meanwhile, or because
	// the TryLock that saw it was so long ago. The hold was released or ran out; which
	// of them is not known.
	ErrFateUnknown = errors.New("dmutex: the hold has ended, but not known how")

	// ErrNoExpiry is matched when the key holds a value that never expires. No
	// lock does, so the key is somebody's data, or was made permanent by hand.
	// It is left as it is.
	ErrNoExpiry = errors.New("dmutex: key holds a value without expiry, which no lock has")
)

// ErrFailedToLock is what Lock and TryLock return, as a pointer, when they fail
// for any reason other than that the lock is taken.
type ErrFailedToLock struct {
	Key string // the lock's key
	Err error  // why, never nil
}

func (e *ErrFailedToLock) Error() string {
	return fmt.Sprintf("dmutex: failed to lock %q: %v", e.Key, e.Err)
}

// Unwrap returns the cause.
func (e *ErrFailedToLock) Unwrap() error { return e.Err }

// ErrFailedToUnlock is what Unlock returns, as a pointer, when it could not
// release the lock or could not find out whether it has.
type ErrFailedToUnlock struct {
	Key string // the lock's key
	Err error  // why, never nil
}

func (e *ErrFailedToUnlock) Error() string {
	return fmt.Sprintf("dmutex: failed to unlock %q: %v", e.Key, e.Err)
}

// Unwrap returns the cause.
func (e *ErrFailedToUnlock) Unwrap() error { return e.Err }

// ErrFailedToExtend is what Extend returns, as a pointer, when the hold does not last
// for longer, or it is not known whether it does.
type ErrFailedToExtend struct {
	Key string // the lock's key
	Err error  // why, never nil
}

func (e *ErrFailedToExtend) Error() string {
	return fmt.Sprintf("dmutex: failed to extend %q: %v", e.Key, e.Err)
}

// Unwrap returns the cause.
func (e *ErrFailedToExtend) Unwrap() error { return e.Err }
