//! A name for the future of an async closure, so that it can be required to be `Send`.

/// An async closure whose future can be named.
///
/// `AsyncFnOnce(&mut Tx)` alone cannot say that the future it returns is `Send`, which spawning needs; this trait can,
/// by its `Fut`. It is implemented for every closure it could be; nobody has to implement it. It will go when the
/// language can bound such a future itself (return type notation).
pub trait AsyncFunc<T, R>:
    AsyncFnOnce(T) -> R + FnOnce(T) -> <Self as AsyncFunc<T, R>>::Fut
{
    /// The future of one call.
    type Fut: Future<Output = R>;
}

impl<T, R, F, Fut> AsyncFunc<T, R> for F
where
    F: AsyncFnOnce(T) -> R + FnOnce(T) -> Fut,
    Fut: Future<Output = R>,
{
    type Fut = Fut;
}
