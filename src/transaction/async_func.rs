//! What is required of closures, in words that the compiler shows where one does not fit.

/// An async closure whose future can be named.
///
/// `AsyncFnOnce(&mut Tx)` alone cannot say that the future it returns is `Send`, which spawning needs; this trait can,
/// by its `Fut`. It is implemented for every closure it could be; nobody has to implement it. It will go when the
/// language can bound such a future itself (return type notation).
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an async closure over `{T}`, or its bounds do not say so",
    label = "to be written `async |tx| {{ … }}`",
    note = "a function that passes a closure on repeats these bounds: `for<'r> F: AsyncFnOnce(&'r mut Tx) -> Result<R, E> + \
            AsyncFunc<&'r mut Tx, Result<R, E>, Fut: Send> + Send + Clone`",
    note = "see the page \"When the compiler objects\", `lockkeeper::guide::compiler`"
)]
pub trait AsyncFunc<T, R>:
    AsyncFnOnce(T) -> R + FnOnce(T) -> <Self as AsyncFunc<T, R>>::Fut
{
    /// The future of one call.
    type Fut: Future<Output = R>;
}

// So that the message above is shown, and not what is missing for this.
#[diagnostic::do_not_recommend]
impl<T, R, F, Fut> AsyncFunc<T, R> for F
where
    F: AsyncFnOnce(T) -> R + FnOnce(T) -> Fut,
    Fut: Future<Output = R>,
{
    type Fut = Fut;
}

/// A closure that each attempt runs a clone of. It is implemented for everything that is `Clone`; nobody has to implement it,
/// and the bound of a function that passes a closure on is `Clone`.
#[diagnostic::on_unimplemented(
    message = "the closure may run more than once, so each attempt runs a clone of it, and `{Self}` has none",
    label = "captures something without a clone, such as a `&mut`",
    note = "return the result instead of changing a captured variable: it comes from the attempt that was committed",
    note = "see the page \"When the compiler objects\", `lockkeeper::guide::compiler`"
)]
pub trait RunsAgain: Clone {}

#[diagnostic::do_not_recommend]
impl<T: Clone> RunsAgain for T {}
